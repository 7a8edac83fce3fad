"""The way through apt, with stand-ins for its programs: which lists are used, what is said when it fails."""

import pytest

from pinclip.data import apt

APT_GET = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
  *update) {update} ;;
  *download*) {download}
    for package; do :; done
    echo content of $package > ${{package}}_1%3a2.0_all.deb ;;
esac
"""
DPKG_DEB = """#!/bin/sh
case "$1" in
  -f) echo 1:2.0 ;;
  -x) cp "$2" "$3/file" ;;
esac
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A function that installs the stand-ins and returns the log file of apt-get's arguments."""

    def install(update="true", download="true"):
        folder = tmp_path / "bin"
        folder.mkdir()
        log = tmp_path / "log"
        scripts = {
            "apt-get": APT_GET.format(log=log, update=update, download=download),
            "dpkg-deb": DPKG_DEB,
        }
        for name, text in scripts.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return log

    return install


def fetch(tmp_path):
    into = tmp_path / "into"
    into.mkdir()
    return apt.fetch(["some-package"], into), into


def test_packages_are_unpacked_from_private_lists(programs, tmp_path):
    log = programs()
    versions, into = fetch(tmp_path)
    assert versions == {"some-package": "1:2.0"}
    assert (into / "file").read_text() == "content of some-package\n"
    update, download = log.read_text().splitlines()
    assert update.endswith(" update")
    assert download.endswith(" download some-package")
    assert all("Dir::State::Lists=" in line and "Dir::Cache=" in line for line in (update, download))


def test_the_lists_of_the_system_are_the_fallback(programs, tmp_path):
    log = programs(update="echo 'E: no network' >&2; exit 100")
    fetch(tmp_path)
    update, download = log.read_text().splitlines()
    assert update.endswith(" update")
    assert "Dir::State::Lists" not in download
    assert "Dir::Cache=" in download


def test_a_failed_download_says_why(programs, tmp_path):
    programs(download="echo 'W: noise' >&2; echo 'E: Unable to locate package' >&2; exit 100")
    with pytest.raises(apt.PackagesUnavailable, match=r"^apt-get download: E: Unable to locate package$"):
        fetch(tmp_path)


def test_a_download_without_end_is_given_up(programs, tmp_path, monkeypatch):
    programs(download="exec sleep 30")
    monkeypatch.setattr(apt, "_DOWNLOAD_SECONDS", 0.2)
    with pytest.raises(apt.PackagesUnavailable, match=r"apt-get download took more than 0.2 s"):
        fetch(tmp_path)


def test_no_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(apt.PackagesUnavailable, match="apt-get is not on this machine"):
        fetch(tmp_path)
