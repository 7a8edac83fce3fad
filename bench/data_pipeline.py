"""Pins per second from a store to training batches: decode, crop, jitter, tokens, neighbors."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from bench.registry import Arm, Job, Shape, Work

BATCHES = 8


class Batches:
    """BATCHES batches of the quickstart's kind per call, made in this process or by `workers` ahead of it.

    A worker has some ready when the call begins: those are taken besides, so that as many are made as count.
    """

    def __init__(self, shape: Shape, workers: int):
        from pinclip.data import synthetic
        from pinclip.data.batches import PinBatches
        from pinclip.data.tokenizer import Tokenizer
        from pinclip.data.transforms import TrainTransform
        from pinclip.graph.neighbors import NeighborSampler

        self.folder = tempfile.TemporaryDirectory()
        store = synthetic.build(Path(self.folder.name) / "pins", pins=shape.pins, progress=False)
        tokenizer = Tokenizer.train(store.texts, vocab_size=1024, max_length=32)
        transform = TrainTransform(shape.size, min_crop=0.5, color_jitter=0.1)
        self.batches = PinBatches(
            store,
            torch.arange(len(store)).numpy(),
            tokenizer,
            transform,
            batch_size=shape.batch,
            steps=10**6,
            seed=0,
            neighbors=NeighborSampler(store.graph, 0, board_damping=0.5),
            token_dropout=0.15,
        )
        self.step, self.ready = 0, 2 * workers
        self.loader = iter(self.batches.loader(0, workers, False)) if workers else None

    def __call__(self):
        for _ in range(BATCHES + self.ready):
            batch = self.next()
        return batch

    def next(self):
        if self.loader is not None:
            return next(self.loader)
        self.step += 1
        return self.batches[self.step - 1]


def check(shape: Shape, arm: Arm, step: Batches) -> str:
    """A batch is a function of its number alone, so the next one can be made again and compared."""
    first = step.next()
    again = step.batches[first.step]
    same = torch.equal(first.images, again.images) and torch.equal(first.tokens, again.tokens)
    return "" if same and len(first) == shape.batch else "a batch is not what its number says"


def arm(name: str, workers: int) -> Arm:
    return Arm(name, lambda shape, problem: Batches(shape, workers), "ours")


def _shape(pins: int, batch: int, size: int, **options) -> Shape:
    sizes = {"pins": pins, "batch": batch, "size": size}
    return Shape(f"batch {batch} at {size} px", sizes, dtype="uint8", **options)


ENTRIES = (
    Job(
        "data_pipeline",
        (arm("in the process", 0), arm("one worker", 1)),
        (
            _shape(1870, 256, 64, on=("cpu",), quick=True),
            _shape(1870, 256, 224, on=("cpu",)),
            _shape(60, 8, 16, on=(), tiny=True),
        ),
        lambda shape, mode: Work(0.0, 0.0, float(BATCHES * shape.batch), "pins"),
        check,
    ),
)
