"""One TOML file describes one run.

Every table of the file is one class below; the model's own tables stand next to the model
(`pinclip.models`).  `RunConfig.load` reads and validates the file and names the file, the key and the
nearest valid key when something is wrong.  Configurations are frozen: a run is what its file says.
"""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pinclip.errors import ConfigError
from pinclip.models import FusionConfig, ImageTowerConfig, PinCLIPConfig, TextTowerConfig

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DataConfig(_Table):
    """`[data]`: what to train on and how a pin becomes tensors."""

    path: str = Field(description="a pin store, or a raw folder of pins and edges (docs/data.md)")
    cold_fraction: float = Field(0.15, ge=0, lt=1, description="share of pins withheld with all their edges")
    split_seed: int = Field(0, description="which pins are withheld; apart from `seed`, so that runs compare")
    tokenizer: str | None = Field(
        None, description="a tokenizer.json to load; by default one is trained, of model.text.vocab_size"
    )
    min_crop: float = Field(0.5, gt=0, le=1, description="smallest area share of a random crop; 1 = no crop")
    flip: bool = Field(False, description="mirror half of the training images")
    color_jitter: float = Field(0.1, ge=0, lt=1, description="change of contrast, brightness and saturation")
    token_dropout: float = Field(0.15, ge=0, lt=1, description="share of a training text's tokens left out")
    workers: int = Field(1, ge=0, description="data worker processes per rank")
    max_bad: float = Field(0.05, ge=0, le=1, description="largest share of bad pins that training may skip")


class ModelConfig(_Table):
    """`[model]`: a PinCLIP from scratch, or on the weights of a SigLIP folder (`siglip`)."""

    siglip: str | None = Field(None, description="folder of a saved Hugging Face SiglipModel to start from")
    embed_dim: int = Field(256, ge=1)
    dims: tuple[int, ...] = Field((), description="Matryoshka prefixes, ascending, the last one embed_dim")
    image: ImageTowerConfig | None = None
    text: TextTowerConfig | None = None
    fusion: FusionConfig

    @model_validator(mode="after")
    def _towers_or_siglip(self) -> ModelConfig:
        if self.siglip is None and (self.image is None or self.text is None):
            raise ValueError("needs the tables [model.image] and [model.text], or the key siglip")
        if self.siglip is not None and (self.image is not None or self.text is not None):
            raise ValueError("takes either siglip or the tables [model.image] and [model.text], not both")
        return self

    def architecture(self, vocab_size: int) -> PinCLIPConfig:
        """The model's own configuration, with the vocabulary that the tokenizer really has (a trained one may
        be smaller than `text.vocab_size` allows)."""
        return PinCLIPConfig(
            image=self.image,
            text=self.text.model_copy(update={"vocab_size": vocab_size}),
            fusion=self.fusion,
            embed_dim=self.embed_dim,
            dims=self.dims,
        )


class LossConfig(_Table):
    """`[objective.image_text]` and `[objective.neighbor]`: one pair loss and its temperature."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    init_scale: float = Field(14.3, gt=0)
    max_scale: float = Field(100.0, gt=0)
    init_bias: float = Field(-10.0, description="sigmoid only")


class ObjectiveConfig(_Table):
    """`[objective]`: the weighted sum of pair losses that one step minimises (docs/objective.md)."""

    image_text: LossConfig = LossConfig()
    neighbor: LossConfig = LossConfig()
    image_text_weight: float = Field(1.0, ge=0, description="image of a pin and its own text")
    own_fused_weight: float = Field(0.0, ge=0, description="fused vector of a pin and its own image, text")
    fused_fused_weight: float = Field(0.5, ge=0, description="fused vectors of two neighbors")
    image_fused_weight: float = Field(0.5, ge=0, description="image of a pin, fused vector of a neighbor")
    text_fused_weight: float = Field(0.5, ge=0, description="text of a pin, fused vector of a neighbor")
    mask_known: bool = Field(
        True, description="other pins of the batch that share a training board are no negatives"
    )
    log_q: bool = Field(True, description="correct for popular pins being drawn more often")
    board_damping: float = Field(0.5, ge=0, description="a board is walked in proportion to size^-damping")
    pairs: str | None = Field(None, description="mined pairs to draw neighbors from, in place of walks")

    @property
    def uses_neighbors(self) -> bool:
        return self.fused_fused_weight + self.image_fused_weight + self.text_fused_weight > 0


class OptimConfig(_Table):
    """`[optim]`: AdamW, linear warm-up, cosine to `final_lr_ratio`, clipping of the gradient's norm."""

    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    warmup_steps: int = Field(50, ge=0)
    final_lr_ratio: float = Field(0.0, ge=0, le=1)
    clip_norm: float = Field(1.0, gt=0)


class TrainConfig(_Table):
    """`[train]`: how long, how large, how often."""

    steps: int = Field(ge=1)
    batch_size: int = Field(256, ge=2, description="global batch, over all ranks and micro-batches")
    micro_batches: int = Field(1, ge=1, description="exact gradient accumulation (GradCache)")
    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16: autocast over fp32 parameters; auto: bf16 where the hardware multiplies it"
    )
    log_every: int = Field(10, ge=1)
    eval_every: int = Field(0, ge=0, description="0: only at the end")
    save_every: int = Field(0, ge=0, description="0: only at the end")
    keep: int = Field(2, ge=1, description="checkpoints kept")


class RunConfig(_Table):
    """The whole file."""

    seed: int = Field(0, ge=0)
    out: str = Field(description="run folder, relative to where the command is started")
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig

    @classmethod
    def load(cls, path: str | Path, overrides: dict[str, object] | None = None) -> RunConfig:
        """Read and validate `path`; `overrides` maps dotted keys to values that replace the file's."""
        path = Path(path)
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not a TOML file: {error}") from None
        for key, value in (overrides or {}).items():
            _set(table, key, value)
        return cls.parse(table, str(path))

    @classmethod
    def parse(cls, table: dict, source: str = "configuration") -> RunConfig:
        """Validate a plain table; errors begin with `source` and name the key."""
        try:
            return cls.model_validate(_tuples(table))
        except ValidationError as error:
            raise ConfigError(f"{source}: {_first_problem(error)}") from None

    @model_validator(mode="after")
    def _siglip_brings_no_tokenizer(self) -> RunConfig:
        if self.model.siglip is not None and self.data.tokenizer is None:
            raise ValueError(
                "model.siglip needs data.tokenizer: the tokenizer.json that the weights were trained with"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> RunConfig:
        if self.train.batch_size % (2 * self.train.micro_batches):
            raise ValueError(
                f"train.batch_size = {self.train.batch_size} must be a multiple of "
                f"2 x train.micro_batches = {2 * self.train.micro_batches}"
            )
        return self


def parse_value(text: str) -> object:
    """A value as TOML writes it; what is no TOML value is taken as a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(table: dict, dotted: str, value: object) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{dotted}: {parent} is a value, not a table")
    table[last] = value


def _tuples(value: object) -> object:
    """TOML has arrays only; the configuration's sequences are tuples, because it is frozen."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "the file"
    if problem["type"] == "extra_forbidden":
        valid = _keys(location[:-1])
        near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*location[:-1], near[0]])!r}?" if near else f"valid: {', '.join(valid)}"
        )
        return f"unknown key {key!r}; {hint}"
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if location:
        return f"{key} = {problem['input']!r}: {message}"
    return message


def _keys(location: list[str]) -> list[str]:
    """The valid keys of the table at `location`."""
    table: type[BaseModel] = RunConfig
    for name in location:
        table = _table_class(table.model_fields[name].annotation)
    return list(table.model_fields)


def _table_class(annotation: object) -> type[BaseModel]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next(
            a for a in typing.get_args(annotation) if isinstance(a, type) and issubclass(a, BaseModel)
        )
    return typing.cast(type[BaseModel], annotation)
