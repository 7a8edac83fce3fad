"""Files of Debian packages, without root: `apt-get download` and `dpkg-deb -x` in folders of our own."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pinclip.errors import DataError

# A network that swallows packets must not hold `make train` up for long.
_OPTIONS = ("Acquire::http::Timeout=20", "Acquire::https::Timeout=20", "Acquire::Retries=2")
_UPDATE_SECONDS = 180
_DOWNLOAD_SECONDS = 900


class PackagesUnavailable(DataError):
    """There is no apt here, or it cannot reach these packages."""


def fetch(packages: Sequence[str], into: Path) -> dict[str, str]:
    """Download `packages` and unpack their files below `into`; return {package: version}.

    The lists and the cache are private to this call, so no root is needed and nothing of the system changes.
    If fresh lists cannot be had, those of the system are used. apt checks signatures and hashes as always.
    Raises `PackagesUnavailable` with the reason where there is no apt or a package cannot be had.
    """
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise PackagesUnavailable(f"{program} is not on this machine")
    with tempfile.TemporaryDirectory(prefix="pinclip-apt-") as name:
        folder = Path(name)
        for child in ("lists/partial", "cache/archives/partial"):
            (folder / child).mkdir(parents=True)
        cache = [f"Dir::Cache={folder / 'cache'}", "APT::Sandbox::User=root", *_OPTIONS]
        private = [f"Dir::State::Lists={folder / 'lists'}", *cache]
        try:
            _run(_apt("update", private, ["Debug::NoLocking=true"]), folder, _UPDATE_SECONDS)
            _run([*_apt("download", private), *packages], folder, _DOWNLOAD_SECONDS)
        except PackagesUnavailable:
            _run([*_apt("download", cache), *packages], folder, _DOWNLOAD_SECONDS)
        versions = {}
        for package in packages:
            archive = next(folder.glob(f"{package}_*.deb"))
            versions[package] = _run(["dpkg-deb", "-f", archive.name, "Version"], folder, 60).strip()
            _run(["dpkg-deb", "-x", archive.name, str(into.resolve())], folder, _DOWNLOAD_SECONDS)
    return versions


def _apt(command: str, *options: Sequence[str]) -> list[str]:
    return ["apt-get", "-q", *(f"-o{option}" for group in options for option in group), command]


def _run(command: list[str], folder: Path, seconds: float) -> str:
    what = f"{command[0]} {next((word for word in command if word in ('update', 'download')), command[1])}"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise PackagesUnavailable(f"{what} took more than {seconds} s") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg"))]
        reason = lines[0] if lines else f"exit code {done.returncode}"
        raise PackagesUnavailable(f"{what}: {reason}")
    return done.stdout
