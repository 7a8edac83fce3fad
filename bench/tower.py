"""An encoder block and a whole tower, forward and backward without a loss: images/s or texts/s, MFU, memory.

Arms: ours; the same weights with the ops of torch (SDPA, GELU, a pooling head that forms K and V), eager and
under torch.compile; ours under torch.compile. bf16 autocast on a GPU. Operations are counted as in
bench/train_step.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench import stand_ins, train_step
from bench.registry import Arm, Job, Problem, Shape, Work

MODELS = train_step.MODELS


class Part(NamedTuple):
    """A module and what it is called with."""

    module: nn.Module
    inputs: tuple


def part_of(shape: Shape, device: str) -> Part:
    """The image block or tower on every token; those of the text on packed texts of bench/train_step.py."""
    stand_ins.install()
    from pinclip.models.image_tower import ImageTower, ImageTowerConfig
    from pinclip.models.layers import EncoderLayer, Sequences
    from pinclip.models.text_tower import TextTower, TextTowerConfig

    model, text = MODELS[shape.model], shape.side == "text"
    sizes = dict(zip(("width", "depth", "heads", "mlp_width"), model.text if text else model.image))
    if text:
        config = TextTowerConfig(vocab_size=model.vocabulary, max_length=model.text_length, **sizes)
    else:
        config = ImageTowerConfig(image_size=model.image_size, patch_size=model.patch, **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        if shape.whole:
            batch = train_step.Batch.draw(model, shape.batch, device)
            if text:
                return Part(TextTower(config, model.embed), (batch.tokens, batch.lengths))
            return Part(ImageTower(config, model.embed), (batch.images,))
        layer = EncoderLayer(config)
        if not text:
            tokens = torch.randn(shape.batch, model.image_tokens, config.width)
            return Part(layer, (tokens.requires_grad_(),))
        lengths = train_step.text_lengths(model, shape.batch)
        tokens = torch.randn(int(lengths.sum()), config.width)
        ends = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int().to(device)
        return Part(layer, (tokens.requires_grad_(), Sequences.packed(ends, int(lengths.max()), len(tokens))))


def work(shape: Shape, mode: str) -> Work:
    model, text = MODELS[shape.model], shape.side == "text"
    width, depth, _heads, hidden = model.text if text else model.image
    lengths = train_step.text_lengths(model, shape.batch).double()
    tokens, squares = float(lengths.sum()), float(lengths.square().sum())
    if not text:
        tokens, squares = shape.batch * model.image_tokens, shape.batch * model.image_tokens**2
    depth = depth if shape.whole else 1
    flops = 6.0 * depth * (4 * width * width + 2 * width * hidden) * tokens + 12.0 * depth * width * squares
    return Work(flops, 0.0, shape.batch, "texts" if text else "images")


class Torchs(nn.Module):
    """The module with torch's ops in the place of ours."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        with train_step.torchs_ops():
            return self.module(*inputs)


class Step:
    """Forward, and backward to every parameter (a block: to its input too); calling it runs it."""

    def __init__(self, shape: Shape, device: str, ours: bool, compiled: bool):
        self.device = device
        self.part = part_of(shape, device)
        module = self.part.module if ours else Torchs(self.part.module)
        self.run = torch.compile(module, dynamic=False) if compiled else module
        self.leaves = list(self.part.module.parameters())
        self.leaves += [t for t in self.part.inputs if isinstance(t, Tensor) and t.requires_grad]

    def __call__(self) -> tuple[Tensor, ...]:
        return self.results(self.run, self.device == "cuda")[1]

    def results(self, run, autocast: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        with torch.autocast(self.device, torch.bfloat16, enabled=autocast):
            out = run(*self.part.inputs)
        out = out if isinstance(out, Tensor) else out.pooled
        seed = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
        return out, torch.autograd.grad(out, self.leaves, seed, allow_unused=True)


def check(shape: Shape, arm: Arm, step: Step) -> str:
    """Result and every gradient against the same weights in fp32 without a kernel of ours; both in bf16
    differ by a percent or two, a wrong kernel by more than 10."""
    (true, true_grads), (got, got_grads) = (
        step.results(Torchs(step.part.module), False),
        step.results(step.run, step.device == "cuda"),
    )
    if not (got.float() - true).norm() <= 0.05 * true.norm():
        return f"the result is off by {float((got.float() - true).norm() / true.norm()):.3g} of its norm"
    largest = max(float(each.norm()) for each in true_grads if each is not None)
    for number, (a, b) in enumerate(zip(true_grads, got_grads)):
        if (a is None) != (b is None):
            return f"gradient {number} is missing"
        if a is not None and not float((b.float() - a).norm()) <= 0.1 * float(a.norm()) + 1e-3 * largest:
            return f"gradient {number} of {tuple(a.shape)} is off by {float((b.float() - a).norm()):.3g}"
    return ""


def arm(name: str, ours: bool, compiled: bool, role: str = "rival", **options) -> Arm:
    def make(shape: Shape, problem: Problem) -> Step:
        return Step(shape, problem.extra["device"], ours, compiled)

    return Arm(name, make, role, compiled=compiled, **options)


def shape_of(model: str, side: str, batch: int, whole: bool, **options) -> Shape:
    sizes = {"model": model, "side": side, "batch": batch, "whole": whole}
    return Shape(f"{model} {side} batch {batch}", sizes, **options)


def shapes(whole: bool) -> tuple[Shape, ...]:
    return (
        shape_of("ViT-B/16-256", "image", 256, whole, quick=not whole),
        shape_of("ViT-B/16-256", "image", 1024, whole),
        shape_of("ViT-B/16-256", "text", 1024, whole),
        shape_of("So400m/14-224", "image", 64, whole),
        shape_of("So400m/14-224", "image", 256, whole),
        shape_of("small", "image", 32, whole, dtype="float32", on=("cpu",)),
        shape_of("small", "text", 64, whole, dtype="float32", on=("cpu",)),
        *(shape_of("tiny", side, 4, whole, dtype="float32", on=(), tiny=True) for side in ("image", "text")),
    )


ARMS = (
    arm("pinclip", True, False, "ours"),
    arm("pinclip compiled", True, True, "ours", on=("cuda",), quick=False),
    arm("torch's ops", False, False),
    arm("torch's ops, compiled", False, True, on=("cuda",)),
)

ENTRIES = tuple(
    Job(name, ARMS, shapes(whole), work, check, bound="compute", modes=("forward+backward",))
    for name, whole in (("block", False), ("tower", True))
)
