"""Attention on the CPU: torch's flash kernel, run over groups of sequences with equally many keys.

Grouping by length needs no padding and no mask: the kernel never reads what stands beyond a sequence's
end, so nothing there can leak, and a row without keys is left at 0.  Measured at 256 sequences, forward and
backward: 0.6 to 0.7 of the time of padding with a mask at 66..83 tokens, 0.85 at about 8 tokens.

B batch, N tokens, H heads, D head dim, S segments, T tokens of all segments, G sequences of a group.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# Tokens x heads x head dim in one group: 4 MiB of fp32 in each of q, k, v.  Its copies then come from memory
# that the last group has freed; pages fresh from the system cost up to half as much again as the arithmetic
# at N = 64.  Limits of 1 and 2 MiB take as long.
_GROUP_ELEMENTS = 2**20


@dataclass(frozen=True)
class _Group:
    """G sequences with `keys` keys each: their places in dimension 0, by sequence or by token (varlen)."""

    rows: slice | Tensor
    keys: int
    varlen: bool

    def take(self, source: Tensor) -> Tensor:
        """source [B, ...] -> [G, ...]; varlen [T, ...] -> [G, keys, ...]."""
        part = source[self.rows] if isinstance(self.rows, slice) else source.index_select(0, self.rows)
        return part.unflatten(0, (-1, self.keys)) if self.varlen else part

    def put(self, target: Tensor, part: Tensor) -> None:
        """The inverse of `take`, into `target`; dense keys and values may be cut to `keys`."""
        if self.varlen:
            part = part.flatten(0, 1)
        else:
            target = target[:, : part.shape[1]]
        if isinstance(self.rows, slice):
            target[self.rows] = part
        else:
            target.index_copy_(0, self.rows, part)

    def take_qkv(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the group as views [G, H, N, D], k and v cut to the keys that count."""
        q, k, v = split(tuple(self.take(tensor) for tensor in tensors))
        k, v = k[:, : self.keys], v[:, : self.keys]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def split(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a packed tensor (qkv [.., 3, H, D],), as views; or of (q, k, v), as they are."""
    return tensors[0].unbind(-3) if len(tensors) == 1 else tensors


def forward(
    tensors: tuple[Tensor, ...],
    cu_seqlens: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The result [.., H, D] and each row's logsumexp [.., H], fp32 or fp64; 0 for rows without keys.

    tensors: (qkv [B, N, 3, H, D] or [T, 3, H, D],) or (q, k, v [B, N, H, D]).
    """
    q, k, v = split(tensors)
    if cu_seqlens is None and key_lengths is None and q.numel() and k.numel():
        out, lse = _flash(*(t.transpose(1, 2) for t in (q, k, v)), 0.0, causal, scale=scale)
        return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()
    out = q.new_zeros(q.shape)
    lse = q.new_zeros(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    for group in _groups(q, k, cu_seqlens, key_lengths):
        part, part_lse = _flash(*group.take_qkv(tensors), 0.0, causal, scale=scale)
        group.put(out, part.transpose(1, 2))
        group.put(lse, part_lse.transpose(1, 2))
    return out, lse


def backward(
    grad_out: Tensor,
    tensors: tuple[Tensor, ...],
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """The gradients of `tensors`; `out` and `lse` are `forward`'s."""
    q, k, _ = split(tensors)
    # No group writes the gradient of padding, nor of queries without keys.
    make = torch.zeros_like if key_lengths is not None or k.numel() == 0 else torch.empty_like
    grads = tuple(make(tensor, memory_format=torch.contiguous_format) for tensor in tensors)
    for group in _groups(q, k, cu_seqlens, key_lengths):
        part_grad, part_out, part_lse = (group.take(t).transpose(1, 2) for t in (grad_out, out, lse))
        inputs = (part_grad, *group.take_qkv(tensors), part_out)
        # torch's kernel takes 2 (N = 64) to 6 times (N = 16) as long in bf16 as in fp32 (AVX-512, 2 cores).
        inputs = (tensor.to(part_lse.dtype) for tensor in inputs)
        parts = _flash_backward(*inputs, part_lse, 0.0, causal, scale=scale)
        for grad, part in zip(split(grads), parts):
            group.put(grad, part.transpose(1, 2).to(grad.dtype))
    return grads


def _groups(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, key_lengths: Tensor | None) -> Iterator[_Group]:
    """Groups that hold every sequence with keys once. q, k: [B, N, H, D], or [T, H, D] for varlen."""
    if q.numel() == 0 or k.numel() == 0:
        return
    most_tokens = _GROUP_ELEMENTS // q.shape[-2:].numel()
    varlen = cu_seqlens is not None
    if varlen:
        lengths, starts = cu_seqlens.diff().long(), cu_seqlens[:-1].long()
    else:
        most = max(1, most_tokens // max(q.shape[1], k.shape[1]))
        if key_lengths is None:
            for first in range(0, q.shape[0], most):
                yield _Group(slice(first, first + most), k.shape[1], varlen)
            return
        lengths, starts = key_lengths.long(), torch.arange(q.shape[0])
    order = lengths.argsort(stable=True)
    distinct, counts = lengths.unique(return_counts=True)
    for keys, same in zip(distinct.tolist(), starts[order].split(counts.tolist())):
        if keys == 0:
            continue
        if varlen:
            most = max(1, most_tokens // keys)
        for part in same.split(most):
            yield _Group(_rows(part, keys if varlen else 1), keys, varlen)


def _rows(starts: Tensor, length: int) -> slice | Tensor:
    """Rows start .. start + length of every start; a slice, which needs no copy, where they adjoin."""
    first, end = int(starts[0]), int(starts[-1]) + length
    if end - first == len(starts) * length:
        return slice(first, end)
    return (starts[:, None] + torch.arange(length)).flatten()
