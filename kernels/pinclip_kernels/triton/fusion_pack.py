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
    add,
    add_rows,
    load_rows,
    load_vector,
    mul,
    no_sums,
    row_case,
    row_config,
    standardize,
    standardize_backward,
    store_rows,
    store_sums,
)

# Launch table --------------------------------------------------------------------------------------------

_FORWARD = RowWalk(
    depth=2,
    resident=20,
    reason="""Compiled: 84 to 128 registers a thread, at 768 features up to 168, let all of them be resident.
    Two rows a thread are 18 to 20 KB under way per SM, which for what is read, half of what is moved, is
    about bandwidth times latency on an H200; four rows take up to 255 registers with Triton 3.6.""",
)
_BACKWARD = RowWalk(
    depth=1,
    resident=20,
    reason="""Compiled: a row of two tensors is as much; 80 to 128 registers. Two rows take up to 255.""",
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
    T: tl.constexpr,
    FEATURES: tl.constexpr,
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
    own = load_vector(table + at.to(tl.int64) * D, D, T, FEATURES)
    of_kind = load_vector(types + kind * D, D, T, FEATURES)
    return at, places, count, tl.where(is_fusion, 0, count), slots, tokens, add(own, of_kind)


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
    T: tl.constexpr,
    FEATURES: tl.constexpr,
):
    w, b = load_vector(weight, D, T, FEATURES), load_vector(bias, D, T, FEATURES)
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
            T,
            FEATURES,
        )
        for first in tl.range(first_pin, tl.minimum(first_pin + part, count), ROWS):
            pin = first + tl.arange(0, ROWS)
            rows = pin.to(tl.int64) * places + at
            slot = tl.load(slots + rows, mask=pin < count, other=total)
            there = slot < total  # else it is the padding of a text
            token = load_rows(tokens, rows, there & (pin < read), D, T, FEATURES)
            x_hat, r_mean, r_rstd = standardize(add(token, shared), eps, D, T, FEATURES)
            store_rows(packed, slot, there, add(mul(x_hat, w), b), D, T, FEATURES)
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
    T: tl.constexpr,
    FEATURES: tl.constexpr,
):
    w = load_vector(weight, D, T, FEATURES)
    weight_sum, bias_sum = no_sums(T, FEATURES), no_sums(T, FEATURES)
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
            T,
            FEATURES,
        )
        grad_tokens = tl.where(j >= num_fusion + num_image, grad_text, grad_image)
        shared_sum = no_sums(T, FEATURES)
        for first in tl.range(first_pin, tl.minimum(first_pin + part, count), ROWS):
            pin = first + tl.arange(0, ROWS)
            rows = pin.to(tl.int64) * places + at
            slot = tl.load(slots + rows, mask=pin < count, other=total)
            there = slot < total
            up = load_rows(grad, slot, there, D, T, FEATURES)
            token = load_rows(tokens, rows, there & (pin < read), D, T, FEATURES)
            r_mean = tl.load(mean + slot, mask=there, other=0.0)[:, None, None]
            r_rstd = tl.load(rstd + slot, mask=there, other=0.0)
            x_hat = [(piece - r_mean) * r_rstd[:, None, None] for piece in add(token, shared)]
            # At a place that is padding what is shared may be no number, and the weight anywhere.
            x_hat = [tl.where(there[:, None, None], piece, 0.0) for piece in x_hat]
            weight_sum = add_rows(weight_sum, mul(up, x_hat))
            bias_sum = add_rows(bias_sum, up)
            down = standardize_backward(mul(up, w), x_hat, r_rstd, D)
            down = [tl.where(there[:, None, None], piece, 0.0) for piece in down]
            store_rows(grad_tokens, rows, pin < read, down, D, T, FEATURES)  # the padding of a text too
            shared_sum = add_rows(shared_sum, down)
        store_sums(shared_partials, item, shared_sum, D, T, FEATURES)
    store_sums(weight_partials, tl.program_id(0), weight_sum, D, T, FEATURES)
    store_sums(bias_partials, tl.program_id(0), bias_sum, D, T, FEATURES)


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
        **config.constants(width),
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
        **config.constants(width),
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
