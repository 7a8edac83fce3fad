"""Packing of fusion, image and text tokens on a GPU: packed = standardize(token + shared) w + b.

`shared` is what all tokens of one place have in common: the fusion token or the position, and the type. A
program takes one place j and some of the pins, so that it reads `shared` once, and in the backward pass
sums its gradient over these pins in registers. Forward reads every token and writes every packed row once;
backward reads the packed gradient and the tokens and writes the tokens' gradient once.

Shapes: B pins, T packed rows, D features, J = F + Ni + L places: fusion tokens, image and text positions;
C parts of the pins, P programs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pinclip_kernels.triton._launch import TYPES, CompileCase
from pinclip_kernels.triton._rows import (
    WIDTHS,
    RowConfig,
    RowWalk,
    add_to_partials,
    row_case,
    row_config,
    row_tile,
    row_vector,
    standardize,
    standardize_backward,
)

# Launch table --------------------------------------------------------------------------------------------

_FORWARD = RowWalk(
    depth=4,
    resident=16,
    reason="""Compiled: 104 to 124 registers a thread leave room for 16 warps. With four rows a thread these
    have 32 KB under way per SM, about bandwidth times latency on an H200.""",
)
_BACKWARD = RowWalk(
    depth=2,
    resident=16,
    reason="""Compiled: two rows of two tensors are again four loads a thread; 107 to 148 registers.""",
)
_MOST_PINS = 64  # of one part: what is written per part is then 1% of what is read and written per pin

# Kernels -------------------------------------------------------------------------------------------------


@triton.jit
def _place(
    j,
    fusion_slots,
    image_slots,
    text_slots,
    image,
    text,
    fusion_tokens,
    image_position,
    text_position,
    types,
    pins,
    images,
    texts,
    num_fusion,
    num_image,
    num_text,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of place j: its number within its kind, places of this kind, pins that have it, and for which of them
    there is a token to be read (not of fusion tokens); slots, tokens, shared."""
    is_fusion, is_text = j < num_fusion, j >= num_fusion + num_image
    at = j - tl.where(is_fusion, 0, tl.where(is_text, num_fusion + num_image, num_fusion))
    places = tl.where(is_fusion, num_fusion, tl.where(is_text, num_text, num_image))
    count = tl.where(is_fusion, pins, tl.where(is_text, texts, images))
    slots = tl.where(is_fusion, fusion_slots, tl.where(is_text, text_slots, image_slots))
    tokens = tl.where(is_text, text, image)
    table = tl.where(is_fusion, fusion_tokens, tl.where(is_text, text_position, image_position))
    kind = tl.where(is_fusion, 0, tl.where(is_text, 2, 1))
    shared = row_vector(table + at.to(tl.int64) * D, D, BLOCK) + row_vector(types + kind * D, D, BLOCK)
    return at, places, count, tl.where(is_fusion, 0, count), slots, tokens, shared


@triton.jit(
    do_not_specialize=["pins", "images", "texts", "num_fusion", "num_image", "num_text", "total", "part"]
)
def _fusion_forward_kernel(
    fusion_slots,
    image_slots,
    text_slots,
    image,
    text,
    fusion_tokens,
    image_position,
    text_position,
    types,
    weight,
    bias,
    packed,
    mean,
    rstd,
    pins,
    images,
    texts,
    num_fusion,
    num_image,
    num_text,
    total,
    part,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    w, b = row_vector(weight, D, BLOCK), row_vector(bias, D, BLOCK)
    places_all = num_fusion + num_image + num_text
    for item in tl.range(tl.program_id(0), tl.cdiv(pins, part) * places_all, tl.num_programs(0)):
        j, first_pin = item % places_all, item // places_all * part
        at, places, count, read, slots, tokens, shared = _place(
            j,
            fusion_slots,
            image_slots,
            text_slots,
            image,
            text,
            fusion_tokens,
            image_position,
            text_position,
            types,
            pins,
            images,
            texts,
            num_fusion,
            num_image,
            num_text,
            D,
            BLOCK,
        )
        for first in tl.range(first_pin, tl.minimum(first_pin + part, count), ROWS):
            pin = first + tl.arange(0, ROWS)
            rows = pin.to(tl.int64) * places + at
            slot = tl.load(slots + rows, mask=pin < count, other=total)
            there = slot < total  # else it is the padding of a text
            from_at, here = row_tile(rows, there & (pin < read), D, BLOCK)
            to_at, here_packed = row_tile(slot, there, D, BLOCK)
            token = tl.load(tokens + from_at, mask=here, other=0.0).to(tl.float32)
            x_hat, r_mean, r_rstd = standardize(token + shared[None, :], here_packed, eps, D)
            result = x_hat * w[None, :] + b[None, :]
            tl.store(packed + to_at, result.to(packed.dtype.element_ty), mask=here_packed)
            tl.store(mean + slot, r_mean, mask=there)
            tl.store(rstd + slot, r_rstd, mask=there)


@triton.jit(
    do_not_specialize=["pins", "images", "texts", "num_fusion", "num_image", "num_text", "total", "part"]
)
def _fusion_backward_kernel(
    grad,
    mean,
    rstd,
    fusion_slots,
    image_slots,
    text_slots,
    image,
    text,
    fusion_tokens,
    image_position,
    text_position,
    types,
    weight,
    grad_image,
    grad_text,
    shared_partials,
    weight_partials,
    bias_partials,
    pins,
    images,
    texts,
    num_fusion,
    num_image,
    num_text,
    total,
    part,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    w = row_vector(weight, D, BLOCK)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    places_all = num_fusion + num_image + num_text
    for item in tl.range(tl.program_id(0), tl.cdiv(pins, part) * places_all, tl.num_programs(0)):
        j, first_pin = item % places_all, item // places_all * part
        at, places, count, read, slots, tokens, shared = _place(
            j,
            fusion_slots,
            image_slots,
            text_slots,
            image,
            text,
            fusion_tokens,
            image_position,
            text_position,
            types,
            pins,
            images,
            texts,
            num_fusion,
            num_image,
            num_text,
            D,
            BLOCK,
        )
        grad_tokens = tl.where(j >= num_fusion + num_image, grad_text, grad_image)
        shared_sum = tl.zeros([BLOCK], tl.float32)
        for first in tl.range(first_pin, tl.minimum(first_pin + part, count), ROWS):
            pin = first + tl.arange(0, ROWS)
            rows = pin.to(tl.int64) * places + at
            slot = tl.load(slots + rows, mask=pin < count, other=total)
            there = slot < total
            from_at, here = row_tile(rows, there & (pin < read), D, BLOCK)
            to_at, here_packed = row_tile(slot, there, D, BLOCK)
            up = tl.load(grad + to_at, mask=here_packed, other=0.0).to(tl.float32)
            token = tl.load(tokens + from_at, mask=here, other=0.0).to(tl.float32)
            r_mean = tl.load(mean + slot, mask=there, other=0.0)
            r_rstd = tl.load(rstd + slot, mask=there, other=0.0)
            x_hat = (token + shared[None, :] - r_mean[:, None]) * r_rstd[:, None]
            down = standardize_backward(up * w[None, :], x_hat, r_rstd, D)
            down = tl.where(here_packed, down, 0.0)
            _, written = row_tile(rows, pin < read, D, BLOCK)  # the padding of a text too
            tl.store(grad_tokens + from_at, down.to(grad_tokens.dtype.element_ty), mask=written)
            shared_sum += tl.sum(down, 0)
            weight_sum += tl.sum(up * x_hat, 0)
            bias_sum += tl.sum(up, 0)
        cols = tl.arange(0, BLOCK)
        row = item + tl.zeros([BLOCK], tl.int64)
        tl.store(shared_partials + row * D + cols, shared_sum, mask=cols < D)
    add_to_partials(weight_partials, weight_sum, D, BLOCK)
    add_to_partials(bias_partials, bias_sum, D, BLOCK)


# Launch --------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """Slots int64 [B, F], [Bi, Ni], [Bt, L]: packed rows; T for a padding. image [Bi, Ni, D] and text
    [Bt, L, D] of one dtype; fusion_tokens [F, D], image_position [Ni, D], text_position [L, D] and
    types [3, D] of one dtype. All contiguous."""

    fusion_slots: Tensor
    image_slots: Tensor
    text_slots: Tensor
    image: Tensor
    text: Tensor
    fusion_tokens: Tensor
    image_position: Tensor
    text_position: Tensor
    types: Tensor

    @property
    def sizes(self) -> tuple[int, ...]:
        """B, Bi, Bt, F, Ni, L."""
        (pins, num_fusion), (images, num_image) = self.fusion_slots.shape, self.image_slots.shape
        texts, num_text = self.text_slots.shape
        return pins, images, texts, num_fusion, num_image, num_text

    def parts(self, config: RowConfig) -> tuple[int, int, int]:
        """Pins of a part, parts, and places. A part at a place is an item of work; where there are enough
        pins, every program of a full GPU has several."""
        pins, _, _, *places = self.sizes
        items = 4 * config.full(self.types.device)
        part = max(1, min(_MOST_PINS, pins * sum(places) // items))
        part = triton.cdiv(part, config.rows) * config.rows
        return part, triton.cdiv(pins, part), sum(places)


def forward(
    tokens: Tokens, weight: Tensor, bias: Tensor, total: int, dtype: torch.dtype, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> packed [T, D] of `dtype`; mean, rstd fp32 [T]. weight, bias fp32."""
    width = weight.shape[0]
    config = row_config(width, _FORWARD)
    part, parts, places = tokens.parts(config)
    packed = weight.new_empty((total, width), dtype=dtype)
    mean, rstd = (weight.new_empty(total) for _ in range(2))
    _fusion_forward_kernel[(config.grid(parts * places, weight.device),)](
        *tokens,
        weight,
        bias,
        packed,
        mean,
        rstd,
        *tokens.sizes,
        total,
        part,
        eps,
        D=width,
        ROWS=config.rows,
        BLOCK=config.block,
        num_warps=config.warps,
    )
    return packed, mean, rstd


def backward(
    grad: Tensor, mean: Tensor, rstd: Tensor, tokens: Tokens, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of image and text in their dtype; of `shared` [J, D], weight and bias [D] in fp32.

    Extra memory: 4 D (2 P + C J) bytes, C = B / 64 where there are many pins.
    """
    total, width = grad.shape
    config = row_config(width, _BACKWARD)
    part, parts, places = tokens.parts(config)
    programs = config.grid(parts * places, weight.device)
    grad_image, grad_text = torch.empty_like(tokens.image), torch.empty_like(tokens.text)
    shared_partials = weight.new_empty((parts, places, width))
    weight_partials, bias_partials = weight.new_empty((2, programs, width))
    _fusion_backward_kernel[(programs,)](
        grad,
        mean,
        rstd,
        *tokens,
        weight,
        grad_image,
        grad_text,
        shared_partials,
        weight_partials,
        bias_partials,
        *tokens.sizes,
        total,
        part,
        D=width,
        ROWS=config.rows,
        BLOCK=config.block,
        num_warps=config.warps,
    )
    return grad_image, grad_text, shared_partials.sum(0), weight_partials.sum(0), bias_partials.sum(0)


# Compilations --------------------------------------------------------------------------------------------


def compile_cases() -> list[CompileCase]:
    """Every width of the model's configurations, all in one dtype, or tokens in another than fp32 tables."""
    cases = []
    for tokens in TYPES.values():
        for tables in sorted({tokens, "fp32"}):
            of_tokens = ("image", "text", "grad_image", "grad_text")
            of_tables = ("fusion_tokens", "image_position", "text_position", "types")
            kinds = {
                **dict.fromkeys(("fusion_slots", "image_slots", "text_slots"), "*i64"),
                **dict.fromkeys(of_tokens, f"*{tokens}"),
                **dict.fromkeys((*of_tables, "packed", "grad"), f"*{tables}"),
            }
            for kernel, walk in ((_fusion_forward_kernel, _FORWARD), (_fusion_backward_kernel, _BACKWARD)):
                cases += [row_case(kernel, f"{tokens}+{tables}", kinds, width, walk) for width in WIDTHS]
    return cases
