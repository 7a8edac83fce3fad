"""What the towers and the fusion share: pre-norm transformer blocks in SigLIP's order and names.

A block is `x + out_proj(attention(layer_norm1(x)))`, then `x + fc2(gelu_tanh(fc1(layer_norm2(x))))`
(arXiv 2303.15343; block order of arXiv 2010.11929).  The three input projections of the attention are
one matrix, `qkv_proj` = [q_proj; k_proj; v_proj] stacked by rows, so that the product is already the
packed `[..., 3, H, Dh]` that `pinclip.ops.attention` reads.

Every module reads its own parameters only, and only inside its own forward: ZeRO-3 gathers parameters
module by module, and would show any other module an empty tensor.

Suffixes: B batch, N tokens of one sequence, T packed tokens, D width, H heads, Dh head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pinclip.ops.attention import AttentionPlan, attention, attention_plan
from pinclip.ops.attention_pool import attention_pool
from pinclip.ops.gated_residual_norm import gated_residual_norm
from pinclip.ops.gelu import gelu

# Standard deviation of a unit normal cut at two standard deviations.
_TRUNCATED_STD = 0.87962566103423978


class FrozenConfig(BaseModel):
    """Base of all model configurations: immutable, no unknown keys, no silent change of type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class EncoderConfig(FrozenConfig):
    """Sizes of a stack of transformer blocks. `mlp_width` None means four times the width."""

    width: int = Field(gt=0)
    depth: int = Field(gt=0)
    heads: int = Field(gt=0)
    mlp_width: int | None = Field(default=None, gt=0)
    layer_norm_eps: float = Field(default=1e-6, gt=0)
    activation_checkpointing: bool = False

    @model_validator(mode="after")
    def _heads_divide_width(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    @property
    def hidden_width(self) -> int:
        return 4 * self.width if self.mlp_width is None else self.mlp_width


@dataclass(frozen=True)
class Sequences:
    """Where a batch's sequences stand: packed (`cu_seqlens`, `max_seqlen`) or padded (`key_lengths`)."""

    cu_seqlens: Tensor | None = None  # int32 [S + 1]: x is [T, D]
    max_seqlen: int | None = None
    key_lengths: Tensor | None = None  # int [B]: x is [B, N, D], keys from key_lengths[b] on are padding
    plan: AttentionPlan | None = None  # of packed sequences, for all layers

    @classmethod
    def packed(cls, cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> Sequences:
        return cls(cu_seqlens, max_seqlen, plan=attention_plan(cu_seqlens, tokens, max_seqlen))


DENSE = Sequences()


def lecun_normal_(weight: Tensor) -> None:
    """Truncated normal of variance 1 / fan-in, as flax's `lecun_normal` (SigLIP's dense and patch layers)."""
    std = 1 / math.sqrt(weight[0].numel()) / _TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Projection(nn.Linear):
    """Linear layer with SigLIP's initialisation of a dense layer: LeCun normal weight, zero bias."""

    def reset_parameters(self) -> None:
        lecun_normal_(self.weight)
        nn.init.zeros_(self.bias)


class SelfAttention(nn.Module):
    """`out_proj(attention(qkv_proj(x)))` for dense `[B, N, D]`, padded, or packed `[T, D]` tokens.

    `rows` (int64 [R], packed input only) keeps these rows of the attention's result before `out_proj`:
    where only some tokens are read on, the others cost no projection.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        for weight in (*self.qkv_proj.weight.chunk(3), self.out_proj.weight):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.qkv_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, sequences: Sequences = DENSE, rows: Tensor | None = None) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1))
        mixed = attention(
            qkv,
            cu_seqlens=sequences.cu_seqlens,
            max_seqlen=sequences.max_seqlen,
            key_lengths=sequences.key_lengths,
            plan=sequences.plan,
        )
        return self.out_proj(mixed if rows is None else mixed.index_select(0, rows))


class GeluLinear(nn.Linear):
    """`gelu_tanh(x W^T + b)`; on a GPU, adding b and the GELU are one op, with both gradients in one pass.

    A module of its own, as ZeRO-3 brings the parameters of a module together when that one is called.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return F.gelu(super().forward(x), approximate="tanh")
        product = F.linear(x, self.weight)
        return gelu(product, self.bias.to(product.dtype), approximate="tanh")


class MLP(nn.Module):
    """`fc2(gelu_tanh(fc1(x)))`; `fc1` applies the GELU itself."""

    def __init__(self, width: int, hidden_width: int):
        super().__init__()
        self.fc1 = GeluLinear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class EncoderLayer(nn.Module):
    """One pre-norm block, SigLIP's names."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = MLP(config.width, config.hidden_width)

    def forward(self, x: Tensor, sequences: Sequences = DENSE) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), sequences)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """A stack of `EncoderLayer`; runs all of them, or those from `start` up to `stop`.

    With `activation_checkpointing` a block keeps only its input for the backward pass and runs its forward
    a second time there.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.activation_checkpointing = config.activation_checkpointing
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.depth))

    def forward(
        self, x: Tensor, sequences: Sequences = DENSE, start: int = 0, stop: int | None = None
    ) -> Tensor:
        for layer in list(self.layers)[start:stop]:
            x = run(layer, x, sequences, recompute=self.activation_checkpointing)
        return x


def run(layer: nn.Module, *args, recompute: bool):
    """`layer(*args)`, or the same with its activations recomputed in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *args, use_reentrant=False)
    return layer(*args)


class PatchEmbedding(nn.Conv2d):
    """Disjoint patches `[B, 3, S, S]` -> `[B, (S / p)^2, D]`, with the weights of SigLIP's convolution.

    Stride equals kernel size, so the convolution is one matrix product over the unfolded patches.
    """

    def __init__(self, patch_size: int, width: int):
        super().__init__(3, width, kernel_size=patch_size, stride=patch_size)

    def reset_parameters(self) -> None:
        lecun_normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        p = self.kernel_size[0]
        patches = images.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch, (height // p) * (width // p), channels * p * p)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class ProbeAttention(nn.Module):
    """Attention of learned probes `[P, D]` over tokens `[B, N, D]` -> `[B, P, D]`.

    Parameters as `nn.MultiheadAttention`: `in_proj_weight` `[3D, D]` = [query; key; value], `in_proj_bias`
    `[3D]`, `out_proj`.  Keys and values are never formed (`pinclip.ops.attention_pool`, absorbed form).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Projection(width, width)
        for weight in self.in_proj_weight.chunk(3):
            nn.init.xavier_uniform_(weight)

    def forward(self, probes: Tensor, x: Tensor) -> Tensor:
        w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        b_q, b_k, b_v = self.in_proj_bias.chunk(3)
        q = F.linear(probes, w_q, b_q)
        return self.out_proj(attention_pool(x, q, w_k, b_k, w_v, b_v, num_heads=self.heads))


class AttentionPoolHead(nn.Module):
    """SigLIP's pooling head, `[B, N, D]` -> `[B, D]`: `h = attention(probe, x)`, `h + mlp(layernorm(h))`."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.width))
        self.attention = ProbeAttention(config.width, config.heads)
        self.layernorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = MLP(config.width, config.hidden_width)
        nn.init.xavier_uniform_(self.probe)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention(self.probe[0], x).squeeze(1)
        return h + self.mlp(self.layernorm(h))


class GatedResidualNorm(nn.Module):
    """`residual = x + g * y`, `normed = LayerNorm(residual)`; returns (residual, normed).

    `kind` "channel": g is a vector, one number for each channel (LayerScale, arXiv 2103.17239); "tanh":
    g = tanh of one learned number (Flamingo's gate, arXiv 2204.14198).
    """

    def __init__(self, width: int, kind: str, init: float, eps: float):
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.gate = nn.Parameter(torch.full((width if kind == "channel" else 1,), init))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return gated_residual_norm(x, y, self.gate, self.weight, self.bias, gate_kind=self.kind, eps=self.eps)
