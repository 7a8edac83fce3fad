"""Checkpoints: written aside, hashed, synced and renamed; resume takes the newest one that is whole.

RUN/checkpoints/step-00000200/
    state/          what DeepSpeed writes, a part per rank
    manifest.json   step, configuration, number of ranks, size and SHA-256 of every file
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from pinclip import distributed
from pinclip.errors import CheckpointError, DataError
from pinclip.io import sync_tree, writing
from pinclip.train.config import RunConfig
from pinclip.train.engine import Engine

log = logging.getLogger(__name__)

# Keys that may change between the interrupted run and its continuation: none of them moves a number.
_FREE = {"out", "data.workers", "train.log_every", "train.eval_every", "train.save_every", "train.keep"}


def save(engine: Engine, run: Path, step: int, config: RunConfig) -> None:
    """Write the state after `step` steps. A collective: every rank calls it."""
    folder = run / "checkpoints"
    final, partial = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"
    with _removed_on_failure(partial), writing(folder):
        if distributed.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        distributed.barrier()
        engine.save(partial, {"step": step})
        distributed.barrier()
        if distributed.rank() == 0:
            manifest = {
                "step": step,
                "world_size": distributed.world_size(),
                "config": config.model_dump(mode="json"),
                "files": {
                    str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                    for path in sorted(partial.rglob("*"))
                    if path.is_file()
                },
            }
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
            sync_tree(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in _folders(run)[config.train.keep :]:
                shutil.rmtree(old, ignore_errors=True)
        distributed.barrier()


def newest(run: Path, config: RunConfig) -> Path | None:
    """The newest whole checkpoint of `run`, or None; CheckpointError if another configuration made it."""
    for folder in _folders(run):
        manifest = _whole(folder)
        if manifest is not None:
            _same_run(folder, manifest, config)
            return folder
    return None


@contextlib.contextmanager
def _removed_on_failure(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # torch's writer reports a full disk as a RuntimeError of its archive format.
        if isinstance(error, RuntimeError) and "inline_container" in str(error):
            raise DataError(
                f"cannot write {partial}: the disk is full, or a file size limit was reached"
            ) from error
        raise


def _folders(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def _whole(folder: Path) -> dict | None:
    """The manifest, if every file is there as it was written; a damaged checkpoint is passed over, loudly."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, entry in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
                raise ValueError(f"{name} is not as it was written")
        return manifest
    except (OSError, ValueError, KeyError) as error:
        log.warning("passing over the damaged checkpoint %s: %s", folder, error)
        return None


def _same_run(folder: Path, manifest: dict, config: RunConfig) -> None:
    then, now = _flat(manifest["config"]), _flat(config.model_dump(mode="json"))
    for key in sorted(then.keys() | now.keys()):
        if key not in _FREE and then.get(key) != now.get(key):
            raise CheckpointError(
                f"{folder}: made with {key} = {then.get(key)!r}, this configuration has {now.get(key)!r}"
            )
    if manifest["world_size"] != distributed.world_size():
        raise CheckpointError(
            f"{folder}: made by {manifest['world_size']} processes, this run has {distributed.world_size()}"
        )


def _flat(table: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
