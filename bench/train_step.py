"""One training step, towers and loss and optimizer, on one synthetic batch: images/s, MFU, peak memory, time
by op.

Arms: ours; the same model with torch's SDPA, a pooling head that forms K and V, and an eager loss; that
compiled; open_clip's model of the same sizes with its loss, eager and compiled. bf16 autocast on a GPU, AdamW
(fused on a GPU).

Useful operations count real text tokens only, the same for every arm: 6 per matrix weight and token, and
12 N² D per layer for attention. (open_clip's image tower has one token more, and its text tower is causal.)
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import stand_ins
from bench.registry import Arm, Job, Problem, Shape, Work

_GROUPS = (  # the first that a name holds a part of; the rest is "other"
    ("optimizer", ("adam", "foreach")),
    ("attention", ("attention", "flash", "fmha", "attn")),
    (
        "pair loss",
        ("contrastive", "cross_entropy", "log_softmax", "nll_loss", "statistics", "gradient_kernel"),
    ),
    ("matrix products", ("mm", "gemm", "cutlass", "nvjet", "xmma", "conv")),
    ("norms", ("layer_norm", "layernorm", "vector_norm")),
    ("activations", ("gelu",)),
    ("copies and casts", ("copy", "cat", "memcpy", "memset", "index", "fill")),
    ("fused pointwise", ("triton",)),
)


@dataclass(frozen=True)
class Model:
    """Sizes of two towers; `text_mean`: average number of real tokens of a text."""

    image_size: int
    patch: int
    image: tuple[int, int, int, int]  # width, depth, heads, MLP width
    text: tuple[int, int, int, int]
    text_length: int
    text_mean: int
    vocabulary: int
    embed: int

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch) ** 2


MODELS = {
    "ViT-B/16-256": Model(256, 16, (768, 12, 12, 3072), (512, 12, 8, 2048), 64, 20, 49408, 512),
    "So400m/14-224": Model(224, 14, (1152, 27, 16, 4304), (1152, 27, 16, 4304), 64, 20, 32000, 1152),
    "small": Model(64, 8, (192, 4, 3, 768), (192, 4, 3, 768), 32, 12, 4096, 192),
    "tiny": Model(32, 8, (32, 2, 2, 64), (32, 2, 2, 64), 12, 6, 101, 16),
}


@dataclass
class Batch:
    images: Tensor
    tokens: Tensor
    lengths: Tensor  # on the host

    @classmethod
    def draw(cls, model: Model, size: int, device: str) -> Batch:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(size, 3, model.image_size, model.image_size, generator=generator)
        tokens = torch.randint(1, model.vocabulary, (size, model.text_length), generator=generator)
        return cls(images.to(device), tokens.to(device), text_lengths(model, size))


@functools.lru_cache(maxsize=32)
def text_lengths(model: Model, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    drawn = -torch.log(torch.rand(size, generator=generator)) * 0.7 * model.text_mean + 0.3 * model.text_mean
    return drawn.long().clamp(1, model.text_length)


def flops(model: Model, size: int) -> float:
    """Useful operations of one step, forward and backward."""
    lengths = text_lengths(model, size).double()

    def tower(sizes: tuple[int, int, int, int], tokens: float, squares: float) -> float:
        width, depth, _heads, hidden = sizes
        weights = depth * (4 * width * width + 2 * width * hidden)
        return 6.0 * weights * tokens + 12.0 * depth * width * squares

    n = model.image_tokens
    image = tower(model.image, size * n, size * n * n) + 6.0 * size * n * 3 * model.patch**2 * model.image[0]
    text = tower(model.text, float(lengths.sum()), float(lengths.square().sum()))
    return image + text + 8.0 * size * size * model.embed


def work(shape: Shape, mode: str) -> Work:
    return Work(flops(MODELS[shape.model], shape.batch), 0.0, shape.batch, "images")


# The arms' models: forward(batch) -> loss


class Ours(nn.Module):
    """PinCLIP's towers and pair loss."""

    def __init__(self, model: Model):
        super().__init__()
        stand_ins.install()
        from pinclip.models.image_tower import ImageTower, ImageTowerConfig
        from pinclip.models.text_tower import TextTower, TextTowerConfig

        def sizes(of):
            return dict(zip(("width", "depth", "heads", "mlp_width"), of))

        image = ImageTowerConfig(image_size=model.image_size, patch_size=model.patch, **sizes(model.image))
        text = TextTowerConfig(vocab_size=model.vocabulary, max_length=model.text_length, **sizes(model.text))
        self.image, self.text = ImageTower(image, model.embed), TextTower(text, model.embed)
        self.log_scale = nn.Parameter(torch.tensor([2.66]))

    def forward(self, batch: Batch) -> Tensor:
        from pinclip.ops.l2_normalize import l2_normalize

        image = l2_normalize(self.image(batch.images).pooled.float())
        text = l2_normalize(self.text(batch.tokens, batch.lengths).pooled.float())
        return self.loss(image, text, self.log_scale.exp().squeeze(0))

    def loss(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        from pinclip.ops.contrastive import contrastive_loss

        return contrastive_loss(image, text, scale)


class Eager(Ours):
    """The same weights with what torch has: SDPA, K and V formed in the pooling head, both matrices of
    logits.
    """

    def forward(self, batch: Batch) -> Tensor:
        with torchs_ops():
            image = F.normalize(self.image(batch.images).pooled.float(), dim=1)
            text = F.normalize(self.text(batch.tokens, batch.lengths).pooled.float(), dim=1)
        return self.loss(image, text, self.log_scale.exp().squeeze(0))

    def loss(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return _eager_loss(image, text, scale)


@contextlib.contextmanager
def torchs_ops():
    """Inside, the towers run torch's attention, a pooling head that forms K and V, and torch's GELU."""
    from pinclip.models import layers

    ours = layers.attention, layers.attention_pool, layers.GeluLinear.forward
    layers.attention, layers.attention_pool, layers.GeluLinear.forward = _sdpa, _sdpa_pool, _gelu_linear
    try:
        yield
    finally:
        layers.attention, layers.attention_pool, layers.GeluLinear.forward = ours


def _gelu_linear(self, x):
    return F.gelu(nn.Linear.forward(self, x), approximate="tanh")


def _eager_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(len(image), device=image.device)
    return (
        F.cross_entropy(scale * image @ text.T, labels) + F.cross_entropy(scale * text @ image.T, labels)
    ) / 2


def _sdpa(qkv, *, cu_seqlens=None, max_seqlen=None, key_lengths=None, plan=None):
    """torch's attention on the layouts of our towers; packed sequences are padded for it."""
    if cu_seqlens is None:
        q, k, v = qkv.unbind(-3)
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return out.transpose(1, 2).flatten(2)
    lengths = cu_seqlens.diff()
    token = torch.arange(qkv.shape[0], device=qkv.device)
    segment = torch.searchsorted(cu_seqlens, token.int(), right=True) - 1
    slot = segment * max_seqlen + token - cu_seqlens[segment]
    padded = qkv.new_zeros(len(lengths) * max_seqlen, *qkv.shape[1:]).index_copy(0, slot, qkv)
    q, k, v = (t.transpose(1, 2) for t in padded.unflatten(0, (len(lengths), max_seqlen)).unbind(2))
    mask = (torch.arange(max_seqlen, device=qkv.device) < lengths[:, None])[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    return out.flatten(0, 1).index_select(0, slot)


def _sdpa_pool(x, q, w_k, b_k, w_v, b_v, *, num_heads):
    key, value = (
        F.linear(x, w, b).unflatten(-1, (num_heads, -1)).transpose(1, 2) for w, b in ((w_k, b_k), (w_v, b_v))
    )
    query = q.to(key.dtype).unflatten(-1, (num_heads, -1)).transpose(0, 1).expand(x.shape[0], -1, -1, -1)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class OpenClip(nn.Module):
    """open_clip's CLIP of the same sizes with its own loss; texts are padded, as it has them."""

    def __init__(self, model: Model):
        super().__init__()
        from open_clip.loss import ClipLoss
        from open_clip.model import CLIP

        width, depth, heads, hidden = model.image
        vision = {
            "image_size": model.image_size,
            "patch_size": model.patch,
            "width": width,
            "layers": depth,
            "head_width": width // heads,
            "mlp_ratio": hidden / width,
        }
        width, depth, heads, hidden = model.text
        text = {
            "context_length": model.text_length,
            "vocab_size": model.vocabulary,
            "width": width,
            "layers": depth,
            "heads": heads,
            "mlp_ratio": hidden / width,
        }
        self.clip, self.loss = CLIP(model.embed, vision, text, output_dict=False), ClipLoss()

    def forward(self, batch: Batch) -> Tensor:
        image, text, scale = self.clip(batch.images, batch.tokens)[:3]
        return self.loss(image.float(), text.float(), scale)


class Step:
    """One optimizer step on one batch; calling it runs it."""

    def __init__(self, build, shape: Shape, device: str, compiled: bool):
        self.shape, self.device, self.build = shape, device, build
        model = MODELS[shape.model]
        torch.manual_seed(0)
        with torch.device(device):
            self.module = build(model)
        self.batch = Batch.draw(model, shape.batch, device)
        self.run = torch.compile(self.module, dynamic=False) if compiled else self.module
        self.optimizer = torch.optim.AdamW(self.module.parameters(), 1e-6, fused=device == "cuda" or None)

    def loss_and_backward(self, module: nn.Module, batch: Batch, autocast: bool = True) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=autocast and self.device == "cuda"):
            loss = module(batch)
        loss.backward()
        return loss.detach()

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_and_backward(self.run, self.batch)
        self.optimizer.step()
        return loss

    def facts(self) -> dict[str, Any]:
        """Milliseconds of one step by kind of work, from torch's profiler; parameters."""
        activity = torch.profiler.ProfilerActivity
        activities = [activity.CUDA] if self.device == "cuda" else [activity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            self()
            if self.device == "cuda":
                torch.cuda.synchronize()
        split: dict[str, float] = {}
        for event in profile.key_averages():
            spent = event.self_device_time_total if self.device == "cuda" else event.self_cpu_time_total
            split[group(event.key)] = split.get(group(event.key), 0.0) + spent / 1e3
        split = dict(sorted(split.items(), key=lambda item: -item[1]))
        return {"split_ms": split, "parameters": sum(p.numel() for p in self.module.parameters())}


def group(name: str) -> str:
    """The kind of work that a profiler's event belongs to."""
    name = name.lower()
    return next((kind for kind, parts in _GROUPS if any(part in name for part in parts)), "other")


def check(shape: Shape, arm: Arm, step: Step) -> str:
    """Loss and gradients of few samples against the same weights in fp32 without a kernel of ours.

    bf16 towers of some dozen layers differ by a percent or two; a wrong kernel differs by more than 10.
    """
    build = Eager if isinstance(step.module, Ours) else OpenClip
    batch = step.batch
    few = min(8, len(batch.tokens))
    few = Batch(batch.images[:few], batch.tokens[:few], batch.lengths[:few])
    torch.manual_seed(0)
    with torch.device(step.device):
        plain = build(MODELS[shape.model])
    plain.load_state_dict(step.module.state_dict())
    losses, norms = [], []
    for module, autocast in ((plain, False), (step.module, True)):
        losses.append(float(step.loss_and_backward(module, few, autocast)))
        norms.append([0.0 if p.grad is None else float(p.grad.norm()) for p in module.parameters()])
        module.zero_grad(set_to_none=True)
    if not abs(losses[1] - losses[0]) <= 0.02 * abs(losses[0]):
        return f"loss {losses[1]:.4g}, in fp32 {losses[0]:.4g}"
    largest = max(norms[0])
    for name, true, got in zip(dict(plain.named_parameters()), *norms):
        if not abs(got - true) <= 0.1 * true + 0.01 * largest:
            return f"gradient of {name} has norm {got:.3g}, in fp32 {true:.3g}"
    return ""


def arm(name: str, build, role: str = "rival", compiled: bool = False, **options) -> Arm:
    def make(shape: Shape, problem: Problem) -> Step:
        return Step(build, shape, problem.extra["device"], compiled)

    return Arm(name, make, role, compiled=compiled, **options)


def shape_of(model: str, batch: int, **options) -> Shape:
    return Shape(f"{model} batch {batch}", {"model": model, "batch": batch}, **options)


ENTRIES = (
    Job(
        "train_step",
        (
            arm("pinclip", Ours, "ours"),
            arm("pinclip, torch's attention and loss", Eager),
            arm("the same compiled", Eager, compiled=True, on=("cuda",)),
            arm("open_clip", OpenClip, quick=False),
            arm("open_clip compiled", OpenClip, compiled=True, on=("cuda",)),
        ),
        (
            *(shape_of("ViT-B/16-256", batch, quick=batch == 512) for batch in (64, 256, 512, 1024, 2048)),
            *(shape_of("So400m/14-224", batch) for batch in (32, 64, 128, 256)),
            shape_of("small", 32, dtype="float32", on=("cpu",), quick=True),
            shape_of("tiny", 4, dtype="float32", on=(), tiny=True),
        ),
        work,
        check,
        bound="compute",
        modes=("train step",),
    ),
)
