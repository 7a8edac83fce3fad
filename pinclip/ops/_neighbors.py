"""What the miners of neighbors check."""

from __future__ import annotations

import torch
from torch import Tensor


def check_starts(starts: Tensor, pins: int) -> None:
    """Starts are int64 [S], each a pin or -1."""
    if starts.dtype != torch.int64 or starts.dim() != 1:
        raise ValueError(f"starts is {starts.dtype} {tuple(starts.shape)}, want torch.int64 of one dimension")
    if starts.numel():
        low, high = (int(bound) for bound in starts.aminmax())
        if low < -1 or high >= pins:
            raise ValueError(f"starts names pin {low if low < -1 else high}, which is not in [0, {pins})")


def check_top(top_k: int, pin_scale: Tensor | None, pins: int) -> None:
    """top_k >= 1; pin_scale None or float32 [pins], finite, not negative."""
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}, want at least 1")
    if pin_scale is None:
        return
    if pin_scale.dtype != torch.float32 or pin_scale.shape != (pins,):
        kind = f"{pin_scale.dtype} {tuple(pin_scale.shape)}"
        raise ValueError(f"pin_scale is {kind}, want torch.float32 ({pins},)")
    if pins and not (pin_scale.isfinite() & (pin_scale >= 0)).all():
        raise ValueError("pin_scale must be finite and not negative")
