"""The fusion's packing: where every token stands, what it becomes, and where its gradient goes."""

import pytest
import torch
from ops_helpers import assert_as_exact_as, assert_exact, assert_same, assert_survives, normal, run
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.nn.functional import layer_norm

from pinclip.ops.fusion_pack import FusionLayout, _fusion_pack, fusion_pack
from pinclip.reference.fusion_pack import fusion_pack as reference

NAMES = ["fusion_tokens", "image", "text", "type_embedding", "image_position", "text_position"]
NAMES += ["weight", "bias"]
# Pin 0 has both, 1 neither, 2 an image and an empty text, 3 a text as long as may be; rows are in any order.
LAYOUT = FusionLayout.build(4, 2, 3, 5, [2, 0], [3, 0, 2], [5, 2, 0])


def problem(layout=LAYOUT, width=4, dtype=torch.float64):
    images, num_image = layout.image_slots.shape
    texts, num_text = layout.text_slots.shape
    return (
        normal(layout.fusion_slots.shape[1], width, seed=0, dtype=dtype),
        normal(images, num_image, width, seed=1, dtype=dtype),
        normal(texts, num_text, width, seed=2, dtype=dtype),
        normal(3, width, seed=3, dtype=dtype),
        normal(num_image, width, seed=4, dtype=dtype),
        normal(num_text, width, seed=5, dtype=dtype),
        normal(width, seed=6, dtype=dtype),
        normal(width, seed=7, dtype=dtype),
    )


def pack(layout=LAYOUT):
    return lambda *t: fusion_pack(*t, layout, 1e-5)


def truth(layout=LAYOUT):
    return lambda *t: reference(*t, layout.source, 1e-5)


def pin_by_pin(fusion, image, text, types, image_position, text_position, weight, bias):
    """LAYOUT written out by hand, one pin after another."""
    image = image + image_position + types[1]
    text = text + text_position + types[2]
    fusion = fusion + types[0]
    rows = torch.cat((fusion, image[1], text[1, :2], fusion, fusion, image[0], fusion, text[0]))
    return layer_norm(rows, weight.shape, weight, bias, 1e-5)


def test_layout_stands_as_said():
    assert LAYOUT.cu_seqlens.tolist() == [0, 7, 9, 14, 21]
    assert LAYOUT.cu_seqlens.dtype == torch.int32 and LAYOUT.source.dtype == torch.int64
    assert LAYOUT.source.tolist() == [0, 1, 5, 6, 7, 13, 14, 0, 1, 0, 1, 2, 3, 4, 0, 1, 8, 9, 10, 11, 12]
    assert LAYOUT.fusion_index().tolist() == [[0, 1], [7, 8], [9, 10], [14, 15]]
    assert (LAYOUT.max_seqlen, LAYOUT.total) == (7, 21)
    everyone = FusionLayout.build(2, 1, 3, 5, None, None, torch.tensor([5, 0]))
    assert everyone.cu_seqlens.tolist() == [0, 9, 13]
    nothing = FusionLayout.build(2, 1, 3, 5, [], [], [])
    assert nothing.cu_seqlens.tolist() == [0, 1, 2] and nothing.source.tolist() == [0, 0]
    moved = LAYOUT.to("meta")
    assert moved.source.is_meta and moved.text_slots.is_meta and moved.total == 21


@pytest.mark.parametrize("seed", range(20))
def test_slots_invert_source(seed):
    """Any batch: each image and text row has one place, and that place has this row."""
    generator = torch.Generator().manual_seed(seed)
    pins, num_image, num_text = torch.randint(1, 7, (3,), generator=generator).tolist()
    images = torch.randperm(pins, generator=generator)[: seed % (pins + 1)]
    texts = torch.randperm(pins, generator=generator)[: (seed // 2) % (pins + 1)]
    lengths = torch.randint(0, num_text + 1, texts.shape, generator=generator)
    layout = FusionLayout.build(pins, 2, num_image, num_text, images, texts, lengths)
    first_text = 2 + layout.image_slots.numel()
    assert layout.source[layout.image_slots.flatten()].tolist() == list(range(2, first_text))
    real = torch.arange(num_text) < lengths[:, None]
    assert torch.equal(layout.source[layout.text_slots[real]], first_text + real.flatten().nonzero()[:, 0])
    assert (layout.text_slots[~real] == layout.total).all()
    assert (layout.source[layout.fusion_slots] == torch.arange(2)).all()
    pin = torch.repeat_interleave(torch.arange(pins), layout.cu_seqlens.diff())
    assert torch.equal(pin[layout.image_slots], images[:, None].expand_as(layout.image_slots))
    owner = texts[:, None].expand_as(layout.text_slots)
    assert torch.equal(pin[layout.text_slots[real]], owner[real])
    assert layout.max_seqlen == int(layout.cu_seqlens.diff().max()) and layout.total == len(layout.source)


def test_is_the_pins_one_after_another():
    assert_exact(truth(), pin_by_pin, problem())
    assert_exact(pack(), pin_by_pin, problem())


def test_gradcheck():
    layout = FusionLayout.build(3, 2, 2, 2, [2, 0], [0, 2], [1, 2])
    leaves = [t.clone().requires_grad_() for t in problem(layout, 3)]
    assert gradcheck(truth(layout), leaves)
    assert gradcheck(pack(layout), leaves)


def test_nothing_there():
    """No image, no text, no pins: shapes and zero gradients stay."""
    for layout in (
        FusionLayout.build(2, 1, 3, 5, [], [], []),
        FusionLayout.build(2, 1, 3, 5, None, [], []),
        FusionLayout.build(0, 1, 3, 5, None, None, []),
    ):
        assert_exact(pack(layout), truth(layout), problem(layout))


def test_padding_does_not_leak():
    tensors = list(problem())
    padding = LAYOUT.text_slots == LAYOUT.total
    expected = run(pack(), tensors)
    tensors[2] = tensors[2].masked_fill(padding[..., None], torch.nan)
    results = run(pack(), tensors)
    assert_same(results, expected)
    assert (results[1][2][padding] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_fp64(dtype):
    """Pins as in training: 64 image tokens, short texts, width 192."""
    layout = FusionLayout.build(6, 1, 64, 20, [0, 1, 3, 5], None, [3, 20, 8, 0, 1, 12])

    def plain(fusion, image, text, types, image_position, text_position, weight, bias):
        join = torch.cat(
            (
                fusion + types[0],
                (image + types[1] + image_position).flatten(0, 1),
                (text + types[2] + text_position).flatten(0, 1),
            )
        )
        return layer_norm(join[layout.source], weight.shape, weight, bias, 1e-5)

    assert_as_exact_as(pack(layout), plain, truth(layout), problem(layout, 192, dtype))


def test_mixed_dtypes_promote():
    """bf16 tokens from projections under autocast, fp32 parameters: an fp32 result, bf16 gradients."""
    tensors = [t.bfloat16() if name in ("image", "text") else t.float() for name, t in zip(NAMES, problem())]
    (out,), gradients = run(pack(), tensors)
    assert out.dtype == torch.float32
    assert [g.dtype for g in gradients] == [t.dtype for t in tensors]
    exact, _ = run(truth(), [t.double() for t in tensors])
    torch.testing.assert_close(out, exact[0].float())


def test_compile_checkpoint_strides_repeat():
    assert_survives(pack(), problem())


def test_opcheck():
    slots = (LAYOUT.fusion_slots, LAYOUT.image_slots, LAYOUT.text_slots)
    leaves = [t.clone().requires_grad_() for t in problem()]
    opcheck(_fusion_pack, (*leaves, LAYOUT.source, *slots, 1e-5))


@pytest.mark.parametrize("name", NAMES)
def test_errors_name_argument_and_value(name):
    tensors = dict(zip(NAMES, problem()))
    right = tensors[name]
    for bad in (right[:-1], right.long(), right.to("meta")):
        if name == "fusion_tokens" and bad.is_meta:
            continue  # the others are named then
        with pytest.raises(ValueError) as error:
            fusion_pack(**{**tensors, name: bad}, layout=LAYOUT)
        value = (
            str(list(bad.shape)) if bad.shape != right.shape else "meta" if bad.is_meta else str(bad.dtype)
        )
        assert name in str(error.value) and value in str(error.value), str(error.value)


@pytest.mark.parametrize(
    "arguments,words",
    [
        ((4, 0, 3, 5, None, None, [1, 1, 1, 1]), ("num_fusion", "0")),
        ((2, 1, 3, 5, [0, 0], None, [1, 1]), ("image_rows", "[0, 0]")),
        ((2, 1, 3, 5, [0, 2], None, [1, 1]), ("image_rows", "[0, 2]")),
        ((2, 1, 3, 5, None, [-1], [1]), ("text_rows", "[-1]")),
        ((2, 1, 3, 5, None, None, [1]), ("text_lengths", "[1]")),
        ((2, 1, 3, 5, None, None, [1, 6]), ("text_lengths", "[0, 5]", "[1, 6]")),
    ],
)
def test_layout_errors_name_argument_and_value(arguments, words):
    with pytest.raises(ValueError) as error:
        FusionLayout.build(*arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_layout_on_another_device():
    with pytest.raises(ValueError, match=r"layout.*meta"):
        fusion_pack(*problem(), LAYOUT.to("meta"))
