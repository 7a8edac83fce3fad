"""Packing of fusion, image and text tokens into one varlen buffer.

Shapes: B pins, F fusion tokens per pin, Bi pins with an image of Ni tokens, Bt pins with a text of at most
L tokens, T packed tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pinclip.ops._checks import (
    check_device,
    check_float,
    check_shape,
    promoted_dtype,
    require,
    without_autocast,
)
from pinclip.ops._host import to_device
from pinclip.ops._rows import runs_triton
from pinclip.reference.attention import accumulation_dtype


@dataclass(frozen=True)
class FusionLayout:
    """Where every token of a batch stands in the packed buffer; built on the host, once per batch.

    A pin's segment is its F fusion tokens, then its Ni image tokens, then its text tokens; a modality that it
    lacks has no token there.

    cu_seqlens     int32 [B+1]      first packed row of every pin, and T
    source         int64 [T]        row of the join of fusion (F), image (Bi*Ni) and text (Bt*L) rows
    fusion_slots   int64 [B, F]     packed row of every fusion token
    image_slots    int64 [Bi, Ni]   packed row of every image token
    text_slots     int64 [Bt, L]    packed row of every text token; T for the padding, which has none
    max_seqlen     longest segment;  total  T
    """

    cu_seqlens: Tensor
    source: Tensor
    fusion_slots: Tensor
    image_slots: Tensor
    text_slots: Tensor
    max_seqlen: int
    total: int

    @classmethod
    def build(
        cls,
        batch_size: int,
        num_fusion: int,
        num_image: int,
        num_text: int,
        image_rows: Tensor | Sequence[int] | None,
        text_rows: Tensor | Sequence[int] | None,
        text_lengths: Tensor | Sequence[int],
    ) -> "FusionLayout":
        """The layout of B pins with F fusion tokens, of which image_rows [Bi] have an image of Ni tokens and
        text_rows [Bt] a text of text_lengths [Bt] tokens, each at most L; None: all pins do.

        Integers and CPU tensors in, CPU tensors out; `.to(device)` moves them.
        """
        image_rows = _pins("image_rows", image_rows, batch_size)
        text_rows = _pins("text_rows", text_rows, batch_size)
        text_lengths = torch.as_tensor(text_lengths, dtype=torch.int64, device="cpu")
        require(num_fusion >= 1, "num_fusion", "be at least 1", num_fusion)
        check_shape("text_lengths", text_lengths, tuple(text_rows.shape), "[Bt]")
        fits = bool(((text_lengths >= 0) & (text_lengths <= num_text)).all())
        require(fits, "text_lengths", f"be in [0, {num_text}]", text_lengths.tolist())
        image_length = torch.zeros(batch_size, dtype=torch.int64).index_fill_(0, image_rows, num_image)
        text_length = torch.zeros(batch_size, dtype=torch.int64).index_copy_(0, text_rows, text_lengths)
        length = num_fusion + image_length + text_length
        ends = length.cumsum(0)
        start, total = ends - length, int(length.sum())

        fusion_slots = start[:, None] + torch.arange(num_fusion)
        image_slots = (start + num_fusion)[image_rows, None] + torch.arange(num_image)
        column = torch.arange(num_text)
        text_slots = (start + num_fusion + image_length)[text_rows, None] + column
        real = column < text_lengths[:, None]
        text_slots = torch.where(real, text_slots, total)

        source = torch.empty(total, dtype=torch.int64)
        source[fusion_slots] = torch.arange(num_fusion).expand(batch_size, -1)
        first_image, first_text = num_fusion, num_fusion + image_slots.numel()
        source[image_slots] = torch.arange(first_image, first_text).view(image_slots.shape)
        source[text_slots[real]] = torch.arange(text_slots.numel()).view(text_slots.shape)[real] + first_text
        cu_seqlens = torch.cat((ends.new_zeros(1), ends)).int()
        max_seqlen = int(length.max()) if batch_size else 0
        return cls(cu_seqlens, source, fusion_slots, image_slots, text_slots, max_seqlen, total)

    def fusion_index(self) -> Tensor:
        """int64 [B, F]: where each pin's fusion tokens stand in the packed buffer."""
        return self.fusion_slots

    def to(self, device: torch.device | str) -> "FusionLayout":
        """The same layout with its tensors on `device`; the host waits for no GPU."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.type is Tensor}
        return replace(self, **{name: to_device(each, device) for name, each in tensors.items()})


def _pins(name: str, rows: Tensor | Sequence[int] | None, batch_size: int) -> Tensor:
    """The pins of the batch that have a modality, int64, each once and in [0, batch_size)."""
    if rows is None:
        return torch.arange(batch_size)
    rows = torch.as_tensor(rows, dtype=torch.int64, device="cpu")
    different = rows.dim() == 1 and rows.unique().numel() == rows.numel()
    require(different, name, "be a list of different pins", rows.tolist())
    fits = bool(((rows >= 0) & (rows < batch_size)).all())
    require(fits, name, f"be in [0, {batch_size})", rows.tolist())
    return rows


def fusion_pack(
    fusion_tokens: Tensor,
    image: Tensor,
    text: Tensor,
    type_embedding: Tensor,
    image_position: Tensor,
    text_position: Tensor,
    weight: Tensor,
    bias: Tensor,
    layout: FusionLayout,
    eps: float = 1e-6,
) -> Tensor:
    """packed[t] = LayerNorm(token + type + position), the tokens of every pin side by side.

    fusion_tokens [F, D], the same for every pin, with a type and no position; image [Bi, Ni, D];
    text [Bt, L, D]; type_embedding [3, D] (fusion, image, text); image_position [Ni, D];
    text_position [L, D]; weight, bias [D] of the LayerNorm; layout: FusionLayout.build, on the tensors'
    device -> packed [T, D].
    Text beyond a text's length is not read, may hold anything, and has zero gradient.

    Floating dtypes may differ; the result has the dtype to which torch promotes them, and everything is
    computed in fp32, or in fp64 where an input is fp64.  Gradients: all eight tensors; each packed row has
    one source row, and what many rows share is summed in a fixed order.  Waits for no device.
    Saved for backward: the inputs and two numbers per packed row; extra memory: their sums before packing.
    Collectives: none.
    On a GPU, but in fp64 or at D > 2048, one kernel for each direction reads and writes every row once; extra
    memory there only in the backward pass: 4 D bytes for every place of a pin and 64 pins.
    Raises ValueError for shapes, dtypes or devices other than these, or than the layout's.
    """
    tensors = (fusion_tokens, image, text, type_embedding, image_position, text_position, weight, bias)
    _check(*tensors, layout)
    slots = (layout.fusion_slots, layout.image_slots, layout.text_slots)
    return _fusion_pack(*tensors, layout.source, *slots, float(eps))[0]


def _check(
    fusion_tokens, image, text, type_embedding, image_position, text_position, weight, bias, layout
) -> None:
    check_shape("fusion_tokens", fusion_tokens, (layout.fusion_slots.shape[1], None), "[F, D]")
    width = fusion_tokens.shape[1]
    check_shape("image", image, (*layout.image_slots.shape, width), "[Bi, Ni, D]")
    check_shape("text", text, (*layout.text_slots.shape, width), "[Bt, L, D]")
    check_shape("type_embedding", type_embedding, (3, width), "[3, D]")
    check_shape("image_position", image_position, (image.shape[1], width), "[Ni, D]")
    check_shape("text_position", text_position, (text.shape[1], width), "[L, D]")
    check_shape("weight", weight, (width,), "[D]")
    check_shape("bias", bias, (width,), "[D]")
    others = {
        "image": image,
        "text": text,
        "type_embedding": type_embedding,
        "image_position": image_position,
        "text_position": text_position,
        "weight": weight,
        "bias": bias,
    }
    for name, tensor in {"fusion_tokens": fusion_tokens, **others}.items():
        check_float(name, tensor)
    check_device("fusion_tokens", fusion_tokens, **others, layout=layout.source)


@torch.library.custom_op("pinclip::fusion_pack", mutates_args=())
@without_autocast
def _fusion_pack(
    fusion_tokens: Tensor,
    image: Tensor,
    text: Tensor,
    type_embedding: Tensor,
    image_position: Tensor,
    text_position: Tensor,
    weight: Tensor,
    bias: Tensor,
    source: Tensor,
    fusion_slots: Tensor,
    image_slots: Tensor,
    text_slots: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the result, and each row's mean and 1/sqrt(var + eps), [T, 1]."""
    tensors = (fusion_tokens, image, text, type_embedding, image_position, text_position, weight, bias)
    dtype = promoted_dtype(*tensors)
    if runs_triton(weight.shape[0], *tensors):
        return _triton(*tensors, source, fusion_slots, image_slots, text_slots, dtype, eps)
    *tokens, weight, bias = (t.to(accumulation_dtype(dtype)) for t in tensors)
    rows = _summed(*tokens, source)
    packed, mean, rstd = torch.native_layer_norm(rows, weight.shape, weight, bias, eps)
    return packed.to(dtype), mean, rstd


@_fusion_pack.register_fake
def _(
    fusion_tokens, image, text, type_embedding, image_position, text_position, weight, bias, source, *_layout
):
    dtype = promoted_dtype(
        fusion_tokens, image, text, type_embedding, image_position, text_position, weight, bias
    )
    row = image.new_empty((source.shape[0], 1), dtype=accumulation_dtype(dtype))
    return image.new_empty((source.shape[0], weight.shape[0]), dtype=dtype), row, torch.empty_like(row)


@torch.library.custom_op("pinclip::fusion_pack_backward", mutates_args=())
@without_autocast
def _fusion_pack_backward(
    grad: Tensor,
    mean: Tensor,
    rstd: Tensor,
    fusion_tokens: Tensor,
    image: Tensor,
    text: Tensor,
    type_embedding: Tensor,
    image_position: Tensor,
    text_position: Tensor,
    weight: Tensor,
    bias: Tensor,
    source: Tensor,
    fusion_slots: Tensor,
    image_slots: Tensor,
    text_slots: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of the eight floating tensors."""
    tensors = (fusion_tokens, image, text, type_embedding, image_position, text_position, weight, bias)
    if runs_triton(weight.shape[0], *tensors):
        return _triton_backward(grad, mean, rstd, *tensors, fusion_slots, image_slots, text_slots)
    *tokens, wide_weight, wide_bias = (t.to(mean.dtype) for t in tensors)
    rows = _summed(*tokens, source)
    grad_rows, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad.to(mean.dtype), rows, weight.shape, mean, rstd, wide_weight, wide_bias, [True, True, True]
    )
    grad_fusion = grad_rows.index_select(0, fusion_slots.flatten()).view(-1, *fusion_tokens.shape).sum(0)
    grad_image = grad_rows.index_select(0, image_slots.flatten()).view(image.shape)
    absent = text_slots == source.shape[0]
    there = text_slots.masked_fill(absent, 0).flatten()
    grad_text = grad_rows.index_select(0, there).view(text.shape).masked_fill_(absent[..., None], 0.0)
    shared = (grad_fusion, grad_image.sum(0), grad_text.sum(0))
    grad_type = torch.stack([part.sum(0) for part in shared])
    grads = (shared[0], grad_image, grad_text, grad_type, *shared[1:], grad_weight, grad_bias)
    return tuple(g.to(t.dtype) for g, t in zip(grads, tensors))


@_fusion_pack_backward.register_fake
def _(grad, mean, rstd, *tensors_and_layout):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors_and_layout[:8])


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:-1])


def _gradients(ctx, grad, _grad_mean, _grad_rstd):
    return *_fusion_pack_backward(grad, *ctx.saved_tensors), *[None] * 5


_fusion_pack.register_autograd(_gradients, setup_context=_save)


def _summed(
    fusion_tokens: Tensor,
    image: Tensor,
    text: Tensor,
    type_embedding: Tensor,
    image_position: Tensor,
    text_position: Tensor,
    source: Tensor,
) -> Tensor:
    """token + type + position of every packed row, [T, D]."""
    parts = (
        (fusion_tokens, type_embedding[0]),
        (image, image_position + type_embedding[1]),
        (text, text_position + type_embedding[2]),
    )
    join = image.new_empty(sum(tokens.numel() for tokens, _ in parts))
    first = 0
    for tokens, shared in parts:
        torch.add(tokens, shared, out=join[first : first + tokens.numel()].view(tokens.shape))
        first += tokens.numel()
    return join.view(-1, image.shape[2]).index_select(0, source)


def _kernel_tokens(fusion_tokens, image, text, type_embedding, image_position, text_position, slots):
    """The op's inputs as the kernels take them."""
    from pinclip_kernels.triton.fusion_pack import Tokens

    def alike(*tensors):
        dtype = promoted_dtype(*tensors)
        return (t.to(dtype).contiguous() for t in tensors)

    tables = alike(fusion_tokens, image_position, text_position, type_embedding)
    return Tokens(*(t.contiguous() for t in slots), *alike(image, text), *tables)


def _triton(
    fusion_tokens, image, text, types, image_position, text_position, weight, bias, source, *slots_dtype_eps
):
    from pinclip_kernels.triton import fusion_pack as kernels

    *slots, dtype, eps = slots_dtype_eps
    tokens = _kernel_tokens(fusion_tokens, image, text, types, image_position, text_position, slots)
    vectors = (t.float().contiguous() for t in (weight, bias))
    with torch.cuda.device_of(image):
        packed, mean, rstd = kernels.forward(tokens, *vectors, source.shape[0], dtype, eps)
    return packed, mean[:, None], rstd[:, None]


def _triton_backward(
    grad, mean, rstd, fusion_tokens, image, text, types, image_position, text_position, weight, bias, *slots
):
    from pinclip_kernels.triton import fusion_pack as kernels

    tokens = _kernel_tokens(fusion_tokens, image, text, types, image_position, text_position, slots)
    with torch.cuda.device_of(image):
        grad_image, grad_text, shared, grad_weight, grad_bias = kernels.backward(
            grad.contiguous(), mean, rstd, tokens, weight.float().contiguous()
        )
    sizes = [len(fusion_tokens), len(image_position), len(text_position)]
    fusion, of_image, of_text = (part.clone() for part in shared.split(sizes))  # results share no memory
    grad_types = torch.stack([part.sum(0) for part in (fusion, of_image, of_text)])
    grads = (fusion, grad_image, grad_text, grad_types, of_image, of_text, grad_weight, grad_bias)
    tensors = (fusion_tokens, image, text, types, image_position, text_position, weight, bias)
    return tuple(g.to(t.dtype) for g, t in zip(grads, tensors))
