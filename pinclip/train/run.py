"""A run folder and what is built from it.

RUN/
    config.json       the validated configuration        environment.json  machine and versions
    split.json        which pins are cold                 bad_pins.jsonl    pins that training skips
    metrics.jsonl     one row every log_every steps       tensorboard/
    checkpoints/      to resume                           model/            to use: weights, tokenizer
    eval.json         retrieval results                   report.html
"""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from pinclip import distributed
from pinclip.data.batches import PinBatches
from pinclip.data.importer import open_dataset
from pinclip.data.store import PinStore
from pinclip.data.tokenizer import Tokenizer
from pinclip.data.transforms import TrainTransform
from pinclip.errors import CheckpointError, ConfigError, DataError
from pinclip.graph.neighbors import NeighborSampler
from pinclip.graph.pairs import NeighborPairs
from pinclip.graph.splits import Split, cold_split
from pinclip.io import atomic_directory, write_text, writing
from pinclip.models import PinCLIP, load_model, save_model
from pinclip.models.siglip import read_configs
from pinclip.train.config import RunConfig


@dataclass
class Run:
    """A run's data: the store, its split, the tokenizer, and the batches that follow from the seed."""

    config: RunConfig
    folder: Path
    store: PinStore
    split: Split
    tokenizer: Tokenizer
    batches: PinBatches


def prepare(config: RunConfig, *, resume: bool) -> Run:
    """Open the data and lay out the run folder. Rank 0 writes, the others read what it wrote."""
    folder = Path(config.out)
    if distributed.rank() == 0:
        _lay_out(folder, config, resume)
    distributed.barrier()
    store = open_dataset(config.data.path)
    split = _split(store, config)
    tokenizer = Tokenizer.load(folder / "tokenizer.json", max_length=_max_length(config))
    return Run(config, folder, store, split, tokenizer, _batches(config, store, split, tokenizer))


def _lay_out(folder: Path, config: RunConfig, resume: bool) -> None:
    store = open_dataset(config.data.path)
    bad = int(store.bad.sum())
    if bad > config.data.max_bad * len(store):
        raise DataError(
            f"{store.root}: {bad} of {len(store)} pins are bad, more than "
            f"data.max_bad = {config.data.max_bad:.0%} allows; they are listed in {store.root}/bad_pins.jsonl"
        )
    split = _split(store, config)
    if config.data.tokenizer:
        tokenizer = Tokenizer.load(config.data.tokenizer, max_length=_max_length(config))
    else:
        texts = (store.texts[pin] for pin in split.train)  # a cold pin's words are withheld with it
        vocab_size = config.model.text.vocab_size
        tokenizer = Tokenizer.train(texts, vocab_size=vocab_size, max_length=_max_length(config))
    with writing(folder):
        if not resume:
            _clear(folder)
        tokenizer.save(folder / "tokenizer.json")
        shutil.copyfile(store.root / "bad_pins.jsonl", folder / "bad_pins.jsonl")
        write_text(folder / "config.json", json.dumps(config.model_dump(mode="json"), indent=1))
        write_text(folder / "split.json", json.dumps(split.to_dict(store.ids)))
        write_text(folder / "environment.json", json.dumps(environment(), indent=1))
    if bad:
        print(f"{bad} bad pins are skipped; they are listed in {folder / 'bad_pins.jsonl'}", flush=True)


def _clear(folder: Path) -> None:
    """A new run in the folder of an old one replaces it: nothing of the old may pass for the new."""
    for name in ("checkpoints", "model", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.jsonl", "eval.json", "report.html", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)


def _split(store: PinStore, config: RunConfig) -> Split:
    return cold_split(store.ids, config.data.cold_fraction, config.data.split_seed, eligible=~store.bad)


def _max_length(config: RunConfig) -> int:
    if config.model.siglip is not None:
        return read_configs(config.model.siglip)[1].max_length
    return config.model.text.max_length


def _image_size(config: RunConfig) -> int:
    if config.model.siglip is not None:
        return read_configs(config.model.siglip)[0].image_size
    return config.model.image.image_size


def _batches(config: RunConfig, store: PinStore, split: Split, tokenizer: Tokenizer) -> PinBatches:
    pins = split.train[~store.bad[split.train]]
    neighbors = None
    if config.objective.uses_neighbors:
        graph = split.training_graph(store.graph)
        if graph.board_sizes.max(initial=0) < 2:
            raise DataError(
                f"{store.root}: no board holds two training pins, so there are no neighbors to align"
            )
        neighbors = NeighborSampler(
            graph,
            config.seed,
            board_damping=config.objective.board_damping,
            pairs=_pairs(config, store, pins),
            anchors=pins,
        )
    return PinBatches(
        store,
        pins,
        tokenizer,
        TrainTransform(_image_size(config), config.data.min_crop, config.data.flip, config.data.color_jitter),
        batch_size=config.train.batch_size,
        steps=config.train.steps,
        seed=config.seed,
        neighbors=neighbors,
        token_dropout=config.data.token_dropout,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def _pairs(config: RunConfig, store: PinStore, pins: np.ndarray) -> NeighborPairs | None:
    """The mined pairs of training pins, which must have been mined without the pins withheld here."""
    path = config.objective.pairs
    if path is None:
        return None
    usable = np.zeros(len(store), bool)
    usable[pins] = True
    pairs = NeighborPairs.load(path, store.ids, usable)
    pairs.check_split(path, config.data.cold_fraction, config.data.split_seed)
    if pairs.dropped and distributed.rank() == 0:
        print(f"{pairs.dropped:,} pairs of {path} name a pin that is not trained on; left out", flush=True)
    return pairs


def build_model(config: RunConfig, tokenizer: Tokenizer) -> PinCLIP:
    """The model of a configuration, initialised from its seed or from a SigLIP folder."""
    torch.manual_seed(config.seed)
    if config.model.siglip is not None:
        model = PinCLIP.from_siglip(config.model.siglip, fusion=config.model.fusion, dims=config.model.dims)
        if tokenizer.vocab_size > model.config.text.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the text tower of {config.model.siglip} "
                f"{model.config.text.vocab_size}; set data.tokenizer to the tokenizer.json of that model"
            )
    else:
        model = PinCLIP(config.model.architecture(tokenizer.vocab_size))
    return model


def export_model(folder: Path, model: PinCLIP, state: dict[str, torch.Tensor], tokenizer: Tokenizer) -> None:
    """Write `RUN/model`: what serving and evaluation need, and nothing of training."""
    with atomic_directory(folder / "model") as out:
        save_model(out, model.config, state)
        tokenizer.save(out / "tokenizer.json")


@dataclass
class TrainedRun:
    """A finished run, opened to use."""

    folder: Path
    config: RunConfig
    model: PinCLIP
    tokenizer: Tokenizer

    @classmethod
    def open(cls, folder: str | Path) -> TrainedRun:
        """Read `RUN/config.json` and `RUN/model`; a clear error if the run never got that far."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: not a run folder (it has no config.json)")
        if not (folder / "model").is_dir():
            raise CheckpointError(f"{folder}: the run has not finished (it has no model folder)")
        config = RunConfig.parse(
            json.loads((folder / "config.json").read_text()), str(folder / "config.json")
        )
        model = load_model(folder / "model")
        tokenizer = Tokenizer.load(
            folder / "model" / "tokenizer.json", max_length=model.config.text.max_length
        )
        return cls(folder, config, model, tokenizer)

    def dataset(self, path: str | None) -> tuple[PinStore, np.ndarray]:
        """The store at `path` (or the run's own) and its pins that this run has not been trained on."""
        store = open_dataset(path or self.config.data.path)
        record = json.loads((self.folder / "split.json").read_text())
        try:
            return store, Split.from_dict(record, store.ids).cold
        except DataError:
            if path is None:
                raise
            return store, np.flatnonzero(~store.bad)


def environment() -> dict[str, str]:
    """Where the numbers come from: machine and versions."""
    names = ("pinclip", "torch", "deepspeed", "triton", "tokenizers", "numpy", "scikit-learn")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
