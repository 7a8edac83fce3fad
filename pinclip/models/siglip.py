"""Read a Hugging Face `SiglipModel` into our towers, and write ours as one. transformers is not needed.

Names map one to one below `vision_model.` and `text_model.`, except that q_proj, k_proj and v_proj of a block
are one matrix here: `self_attn.qkv_proj.weight` = cat([q_proj, k_proj, v_proj]) along the rows, likewise the
bias.  docs/model.md has the table.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pinclip.errors import CheckpointError, ConfigError
from pinclip.io import atomic_directory
from pinclip.models.image_tower import ImageTower, ImageTowerConfig
from pinclip.models.text_tower import TextTower, TextTowerConfig

_PREFIXES = {"image": "vision_model.", "text": "text_model."}
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ACTIVATION = "gelu_pytorch_tanh"

# What a configuration file leaves out has these values (SigLIP base, patch 16, 224 pixels).
_ENCODER_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "layer_norm_eps": 1e-6,
    "hidden_act": _ACTIVATION,
}
_DEFAULTS = {
    "vision_config": {
        **_ENCODER_DEFAULTS,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "vision_use_head": True,
    },
    "text_config": {**_ENCODER_DEFAULTS, "vocab_size": 32000, "max_position_embeddings": 64},
}


@dataclass(frozen=True)
class SiglipCheckpoint:
    """A `SiglipModel` on disk. `logit_scale` is the logarithm, as stored: logits = exp(scale) x.y + bias."""

    image: ImageTowerConfig
    text: TextTowerConfig
    image_state: dict[str, Tensor]
    text_state: dict[str, Tensor]
    logit_scale: float
    logit_bias: float


def read_siglip(directory: str | os.PathLike, *, attend_padding: bool = True) -> SiglipCheckpoint:
    """Read `config.json` and `model.safetensors` (or its sharded form) under our names.

    Errors: CheckpointError naming the file, the key or the value.
    """
    directory = Path(directory)
    image, text = read_configs(directory, attend_padding=attend_padding)
    tensors = _read_tensors(directory)
    scalars = {}
    for name in ("logit_scale", "logit_bias"):
        if name not in tensors:
            raise CheckpointError(f"{directory}: no weight {name}")
        scalars[name] = tensors.pop(name).float().flatten()[0].item()
    tensors = _fuse_qkv(tensors, directory)
    states = {}
    for tower, prefix in _PREFIXES.items():
        names = [name for name in tensors if name.startswith(prefix)]
        states[tower] = {name.removeprefix(prefix): tensors.pop(name) for name in names}
    if tensors:
        raise CheckpointError(f"{directory}: unexpected weight {min(tensors)}: not a SiglipModel")
    return SiglipCheckpoint(image, text, states["image"], states["text"], **scalars)


def load_towers(image_tower: ImageTower, text_tower: TextTower, checkpoint: SiglipCheckpoint) -> None:
    """Copy the weights of `checkpoint` into towers of its configuration, in the towers' dtype.

    Errors: CheckpointError naming the first missing, unexpected or misshapen weight.
    """
    for tower, state, prefix in (
        (image_tower, checkpoint.image_state, _PREFIXES["image"]),
        (text_tower, checkpoint.text_state, _PREFIXES["text"]),
    ):
        wanted = tower.state_dict()
        for name, target in wanted.items():
            if name not in state:
                raise CheckpointError(f"no weight {prefix}{name} in the SigLIP checkpoint")
            if state[name].shape != target.shape:
                raise CheckpointError(
                    f"weight {prefix}{name} has shape {list(state[name].shape)} in the SigLIP checkpoint, "
                    f"its config.json asks for {list(target.shape)}"
                )
        unexpected = sorted(state.keys() - wanted.keys())
        if unexpected:
            raise CheckpointError(f"unexpected weight {prefix}{unexpected[0]} in the SigLIP checkpoint")
        tower.load_state_dict(state)


def siglip_state_dict(image_tower: ImageTower, text_tower: TextTower) -> dict[str, Tensor]:
    """Both towers' weights under `SiglipModel`'s names, without logit scale and bias."""
    state = {}
    for tower, prefix in ((image_tower, _PREFIXES["image"]), (text_tower, _PREFIXES["text"])):
        for name, tensor in tower.state_dict().items():
            if ".qkv_proj." in name:
                for part, piece in zip("qkv", tensor.chunk(3)):
                    state[prefix + name.replace(".qkv_proj.", f".{part}_proj.")] = piece.contiguous()
            else:
                state[prefix + name] = tensor
    return state


def save_siglip(
    directory: str | os.PathLike,
    image_tower: ImageTower,
    text_tower: TextTower,
    *,
    logit_scale: float,
    logit_bias: float,
) -> None:
    """Write both towers as a `SiglipModel` that transformers loads; `logit_scale` is the logarithm.

    Errors: ConfigError if a tower has what SigLIP lacks (funnel stages, mean pooling, an image projection);
    DataError if `directory` cannot be written.  Atomic.
    """
    config = _write_config(image_tower, text_tower)
    state = siglip_state_dict(image_tower, text_tower)
    state["logit_scale"] = torch.tensor([logit_scale])
    state["logit_bias"] = torch.tensor([logit_bias])
    state = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    with atomic_directory(directory) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(state, folder / _SINGLE, metadata={"format": "pt"})


def read_configs(
    directory: str | os.PathLike, *, attend_padding: bool = True
) -> tuple[ImageTowerConfig, TextTowerConfig]:
    """The towers' configurations from `config.json` alone. Errors as `read_siglip`."""
    path = Path(directory) / "config.json"
    config = _read_json(path)
    if config.get("model_type") != "siglip":
        raise CheckpointError(
            f"{path}: model_type is {config.get('model_type')!r}, only 'siglip' can be read "
            "(SigLIP, and SigLIP 2 of fixed resolution)"
        )
    vision, text = ({**defaults, **(config.get(key) or {})} for key, defaults in _DEFAULTS.items())
    wanted = {
        "vision_config.hidden_act": (vision["hidden_act"], _ACTIVATION),
        "text_config.hidden_act": (text["hidden_act"], _ACTIVATION),
        "vision_config.num_channels": (vision["num_channels"], 3),
        "vision_config.vision_use_head": (vision["vision_use_head"], True),
        "text_config.projection_size": (
            text.get("projection_size") or text["hidden_size"],
            vision["hidden_size"],
        ),
    }
    for key, (value, supported) in wanted.items():
        if value != supported:
            raise CheckpointError(f"{path}: {key} is {value!r}, must be {supported!r}")
    try:
        return (
            ImageTowerConfig(
                image_size=_square(path, "image_size", vision["image_size"]),
                patch_size=_square(path, "patch_size", vision["patch_size"]),
                **_encoder_sizes(vision),
            ),
            TextTowerConfig(
                vocab_size=text["vocab_size"],
                max_length=text["max_position_embeddings"],
                pool="last",
                attend_padding=attend_padding,
                **_encoder_sizes(text),
            ),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {where} {first['msg']} (got {first['input']!r})") from error


def _encoder_sizes(config: dict) -> dict:
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_width": config["intermediate_size"],
        "layer_norm_eps": config["layer_norm_eps"],
    }


def _square(path: Path, key: str, value) -> int:
    """An image or patch size, which transformers also allows to be [height, width]."""
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise CheckpointError(f"{path}: vision_config.{key} {list(value)} is not square")
        return value[0]
    return value


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    index_path = directory / _INDEX
    if (directory / _SINGLE).is_file():
        files = [_SINGLE]
    elif index_path.is_file():
        files = sorted(set(_read_json(index_path).get("weight_map", {}).values()))
    else:
        raise CheckpointError(f"{directory}: neither {_SINGLE} nor {_INDEX} is there")
    tensors = {}
    for name in files:
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path}: named by {_INDEX}, but not there")
        try:
            tensors.update(load_file(path))
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    # Older checkpoints store the constant position ids beside the weights.
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}


def _fuse_qkv(state: dict[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """Join each q_proj with its k_proj and v_proj into qkv_proj; other weights keep their names."""
    fused = {}
    for name, tensor in state.items():
        part = next((part for part in "qkv" if f".{part}_proj." in name), None)
        if part is None:
            fused[name] = tensor
            continue
        names = [name.replace(f".{part}_proj.", f".{other}_proj.") for other in "qkv"]
        for other in names:
            if other not in state:
                raise CheckpointError(f"{directory}: no weight {other}, though {part}_proj is there")
            if state[other].shape != tensor.shape:
                shapes = f"{list(state[other].shape)}, {part}_proj has {list(tensor.shape)}"
                raise CheckpointError(f"{directory}: weight {other} has shape {shapes}")
        if part == "q":
            fused[name.replace(".q_proj.", ".qkv_proj.")] = torch.cat([state[other] for other in names])
    return fused


def _write_config(image_tower: ImageTower, text_tower: TextTower) -> dict:
    image, text = image_tower.config, text_tower.config
    lacking = {
        "image.funnel": bool(image.funnel),
        'image.pool = "mean"': image.pool != "attention",
        "an embed_dim that is not the image tower's width": image_tower.projection is not None,
        'text.pool = "mean"': text.pool != "last",
    }
    for what, found in lacking.items():
        if found:
            raise ConfigError(f"a SiglipModel cannot have {what}")
    vision_config = {
        "model_type": "siglip_vision_model",
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "num_channels": 3,
        **_sizes_of(image),
    }
    text_config = {
        "model_type": "siglip_text_model",
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_length,
        "projection_size": image.width,
        **_sizes_of(text),
    }
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "vision_config": vision_config,
        "text_config": text_config,
    }


def _sizes_of(config: ImageTowerConfig | TextTowerConfig) -> dict:
    return {
        "hidden_size": config.width,
        "intermediate_size": config.hidden_width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": _ACTIVATION,
    }


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not there") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content
