"""The kernels of the fusion's packing: in the interpreter, compiled, and on a GPU."""

import pytest
import torch
from ops_helpers import assert_as_exact_as, assert_same, assert_survives, run
from rows_cases import (
    DTYPES,
    assert_captured,
    assert_cases,
    assert_does_not_wait,
    assert_repeats,
    use_row_kernels,
)
from test_fusion_pack import LAYOUT, pack, problem, truth
from triton_cases import interpret

from pinclip.ops.fusion_pack import FusionLayout

LAYOUTS = {
    "mixed": LAYOUT,
    "fusion tokens alone": FusionLayout.build(3, 2, 3, 5, [], [], []),
    "nothing": FusionLayout.build(0, 1, 2, 2, [], [], []),
    "several steps": FusionLayout.build(21, 1, 2, 2, range(19), range(1, 21), [i % 3 for i in range(20)]),
}


def plain(layout):
    def composed(fusion, image, text, types, image_position, text_position, weight, bias):
        image = (image + image_position + types[1]).flatten(0, 1)
        text = (text + text_position + types[2]).flatten(0, 1)
        rows = torch.cat((fusion + types[0], image, text))[layout.source]
        return torch.nn.functional.layer_norm(rows, weight.shape, weight, bias, 1e-5)

    return composed


def test_in_the_interpreter():
    interpret(__file__)


# In the interpreter ---------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    use_row_kernels(monkeypatch, "fusion_pack")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "name,width,dtype",
    [
        *(("mixed", width, dtype) for width in (20, 200, 1152) for dtype in DTYPES),
        ("fusion tokens alone", 20, torch.float16),
        ("nothing", 20, torch.float32),
        ("several steps", 20, torch.float32),
        ("several steps", 192, torch.float16),
        *(("several steps", width, torch.float32) for width in (640, 768, 1152, 1400)),
    ],
)
def check_error(name, width, dtype):
    layout = LAYOUTS[name]
    assert_as_exact_as(pack(layout), plain(layout), truth(layout), problem(layout, width, dtype))


@pytest.mark.usefixtures("kernels")
def check_mixed_dtypes():
    """Tokens in bf16 or fp32, the tables in another: the result in fp32, gradients in their own."""
    for narrow in ((1,), (1, 2), (0, 3), (6,)):
        tensors = list(problem(width=24, dtype=torch.float32))
        for index in narrow:
            tensors[index] = tensors[index].bfloat16()
        (result,), gradients = run(pack(), tensors)
        assert result.dtype == torch.float32
        assert [g.dtype for g in gradients] == [t.dtype for t in tensors]
        (true,), exact = run(truth(), [t.double() for t in tensors])
        torch.testing.assert_close(result, true.float())
        for ours, other in zip(gradients, exact):
            loose = {"rtol": 1e-4, "atol": 1e-5} if ours.dtype == torch.float32 else {}
            torch.testing.assert_close(ours, other.to(ours.dtype), **loose)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def check_text_padding_is_not_read(poison):
    tensors = list(problem(width=24, dtype=torch.float32))
    expected = run(pack(), tensors)
    tensors[2] = tensors[2].masked_fill((LAYOUT.text_slots == LAYOUT.total)[..., None], poison)
    assert_same(run(pack(), tensors), expected)
    tensors[6] = torch.full_like(tensors[6], torch.nan)  # its gradient is zero even then
    for _, gradients in (expected, run(pack(), tensors)):
        assert (gradients[2][LAYOUT.text_slots == LAYOUT.total] == 0).all()


@pytest.mark.usefixtures("kernels")
def check_parts_do_not_matter(monkeypatch):
    from pinclip_kernels.triton import fusion_pack as kernels

    layout = LAYOUTS["several steps"]
    tensors = problem(layout, 192, torch.float32)
    whole = run(pack(layout), tensors)
    monkeypatch.setattr(kernels, "_MOST_PINS", 4)
    assert_same(run(pack(layout), tensors), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("kernels")
def check_compile_checkpoint_strides_repeat():
    assert_survives(pack(), problem(width=24, dtype=torch.float32))


@pytest.mark.usefixtures("kernels")
def check_a_position_of_padding_alone():
    """May be no number: nothing of it reaches a gradient."""
    layout = FusionLayout.build(2, 1, 2, 4, None, None, [3, 2])
    *tensors, text_position, weight, bias = problem(layout, 20, torch.float32)
    text_position[3] = torch.nan
    _, gradients = run(pack(layout), [*tensors, text_position, weight, bias])
    assert all(gradient.isfinite().all() for gradient in gradients)


# Compiled for a GPU that is not there ---------------------------------------------------------------------


def test_compiles_within_budget():
    from pinclip_kernels.triton import fusion_pack as kernels

    names = [
        f"_fusion_{way}_kernel/bf16+bf16/D{width}"
        for way in ("forward", "backward")
        for width in (768, 1024, 1152)
    ]
    cases, walks = kernels.compile_cases(), (kernels._FORWARD, kernels._BACKWARD)
    assert_cases(cases, [(name, arch) for name in names for arch in (80, 90)], walks)


# On a GPU -------------------------------------------------------------------------------------------------


class TestGpu:
    pytestmark = pytest.mark.gpu

    @staticmethod
    def layout(batch, num_fusion, num_image, num_text):
        """One pin in eight has no image, another one no text."""
        pins = torch.arange(batch)
        image_rows, text_rows = pins[pins % 8 != 3], pins[pins % 8 != 5]
        lengths = text_rows * 7 % (num_text + 1)
        return FusionLayout.build(batch, num_fusion, num_image, num_text, image_rows, text_rows, lengths)

    @staticmethod
    def problem(layout, width, dtype):
        return [t.cuda() for t in problem(layout, width, dtype)]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (9, 4, 64, 16), (200, 1, 16, 32)])
    @pytest.mark.parametrize("width", [100, 192, 768, 1024, 1152, 2048])
    def test_error(self, width, sizes, dtype):
        host = self.layout(*sizes)
        layout = host.to("cuda")
        tensors = self.problem(host, width, dtype)
        assert_as_exact_as(pack(layout), plain(layout), truth(layout), tensors)

    def test_survives_and_repeats(self):
        host = self.layout(200, 2, 64, 32)
        layout = host.to("cuda")
        assert_survives(pack(layout), self.problem(host, 768, torch.float32))
        assert_repeats(pack(layout), self.problem(host, 1024, torch.bfloat16), times=20)

    def test_cuda_graph_without_waiting(self):
        host = self.layout(64, 2, 64, 32)
        layout, tensors = host.to("cuda"), self.problem(host, 768, torch.bfloat16)
        assert_captured(pack(layout), tensors)
        assert_does_not_wait(pack(layout), tensors)
