"""A model on disk: `config.json` (the `PinCLIPConfig`) and `model.safetensors` (the state dict, fp32)."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pinclip.errors import CheckpointError
from pinclip.models.pinclip import PinCLIP, PinCLIPConfig


def save_model(folder: str | os.PathLike, config: PinCLIPConfig, state: dict[str, Tensor]) -> None:
    """Write a model into the existing `folder` (inside `atomic_directory` for an atomic one)."""
    folder = Path(folder)
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json"), indent=1) + "\n")
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")


def load_model(folder: str | os.PathLike) -> PinCLIP:
    """Read what `save_model` wrote. CheckpointError names the missing, damaged or mismatched part."""
    folder = Path(folder)
    try:
        config = PinCLIPConfig.model_validate(json.loads((folder / "config.json").read_text()))
        state = load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename or folder}: no such file") from None
    except (ValueError, ValidationError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: not a PinCLIP model folder: {first}") from None
    model = PinCLIP(config)
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | state.keys()):
        if name not in state or name not in wanted or state[name].shape != wanted[name].shape:
            raise CheckpointError(f"{folder}: weight {name!r} does not fit config.json")
    model.load_state_dict(state)
    return model
