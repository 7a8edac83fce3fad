"""The kernels of absorbed attention pooling: in the interpreter, compiled, and on a GPU."""

import importlib

import pytest
import torch
from ops_helpers import assert_as_exact_as, assert_autocast, assert_same, assert_survives, normal, run
from rows_cases import assert_captured, assert_cases, assert_does_not_wait, assert_repeats
from test_attention_pool import plain, problem
from torch.library import opcheck
from triton_cases import interpret

from pinclip.ops.attention_pool import attention_pool
from pinclip.reference.attention_pool import attention_pool as reference

EPS = 1e-5


def with_norm(tensors):
    """A LayerNorm's weight and bias besides; tokens with a mean and a spread of their own."""
    x, *others = tensors
    width, shape = x.shape[2], (*x.shape[:2], 1)
    x = x * normal(*shape, seed=7, dtype=x.dtype).abs().add(0.1) + normal(*shape, seed=8, dtype=x.dtype)
    weight, bias = 1 + normal(width, seed=9, dtype=x.dtype) / 4, normal(width, seed=10, dtype=x.dtype) / 4
    return (x, *others, weight, bias)


def op(heads, lengths=None):
    def pooled(x, q, w_k, b_k, w_v, b_v, *norm):
        norm = (*norm, EPS) if norm else None
        options = {"num_heads": heads, "key_lengths": lengths, "norm": norm, "form": "absorbed"}
        return attention_pool(x, q, w_k, b_k, w_v, b_v, **options)

    return pooled


def truth(heads, lengths=None):
    def pooled(x, q, w_k, b_k, w_v, b_v, *norm):
        norm = (*norm, EPS) if norm else None
        return reference(x, q, w_k, b_k, w_v, b_v, num_heads=heads, key_lengths=lengths, norm=norm)

    return pooled


def standard(heads, lengths=None):
    """Plain torch in the tensors' dtype: K and V formed, padding masked."""

    def pooled(x, q, w_k, b_k, w_v, b_v, *norm):
        keep = None
        if lengths is not None:
            keep = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[:, None, None]
        if norm:
            x = torch.nn.functional.layer_norm(x, x.shape[2:], *norm, EPS)
        return plain(heads, keep)(x, q, w_k, b_k, w_v, b_v)

    return pooled


def test_in_the_interpreter():
    interpret(__file__)


# In the interpreter ---------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """The op runs its kernels on the CPU; what is allocated and not written holds NaN."""
    module = importlib.import_module("pinclip.ops.attention_pool")
    limits = {torch.float16: (16, 1152)}
    monkeypatch.setattr(module, "_kernel_limits", lambda dtype, device: limits.get(dtype, (0, 0)))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize(
    "probes,heads,width,batch,tokens",
    [
        (1, 2, 16, 1, 2),
        (1, 3, 192, 5, 33),  # two parts, the second half empty; two tiles; several samples to a program
        (5, 3, 24, 2, 70),  # as many rows as there may be, but one
        (8, 2, 160, 4, 32),  # all of them, in exactly one tile
    ],
)
def check_error(probes, heads, width, batch, tokens, norm):
    tensors = problem(probes, width, batch, tokens, torch.float16)
    tensors = with_norm(tensors) if norm else tensors
    assert_as_exact_as(op(heads), standard(heads), truth(heads), tensors)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def check_one_token(norm):
    """Its weight is 1 whatever the probe: the probe's gradient is a rounding of what cancels in it."""
    tensors = problem(1, 16, 3, 1, torch.float16)
    tensors = with_norm(tensors) if norm else tensors
    ours, exact = run(op(2), tensors), run(truth(2), [t.double() for t in tensors])
    for kind, true in zip(ours, exact):
        for got, expected in zip(kind, true):
            torch.testing.assert_close(got.double(), expected, rtol=4e-3, atol=4e-3)


LENGTHS = torch.tensor([3, 40, 0, 33, 1])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("poison", [0.0, float("nan")])
def check_padding(poison, norm):
    """Not read, in either direction, and without gradient; a row without tokens gives zero."""
    tensors = problem(2, 24, 5, 40, torch.float16)
    tensors = list(with_norm(tensors) if norm else tensors)
    padding = torch.arange(40) >= LENGTHS[:, None]
    clean = [tensors[0].masked_fill(padding[..., None], 1.0), *tensors[1:]]
    tensors[0] = tensors[0].masked_fill(padding[..., None], poison)
    ours = run(op(2, LENGTHS), tensors)
    assert_same(ours, run(op(2, LENGTHS), clean))
    assert (ours[0][0][2] == 0).all() and (ours[1][0][padding] == 0).all()
    there = LENGTHS > 0  # the others are not a number to plain torch

    def of_rows(function):
        return lambda x, *rest: function(x[there], *rest)

    assert_as_exact_as(
        of_rows(op(2, LENGTHS[there])),
        of_rows(standard(2, LENGTHS[there])),
        of_rows(truth(2, LENGTHS[there])),
        clean,
    )
    assert_same(ours, run(op(2, LENGTHS.int()), tensors))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def check_lengths_beyond_the_tokens(norm):
    """Stand for all tokens; nothing behind a sample is read."""
    tensors = problem(2, 24, 3, 40, torch.float16)
    tensors = list(with_norm(tensors) if norm else tensors)
    tensors[0][1:] = float("nan")  # what stands behind the first sample
    ours = run(op(2, torch.tensor([70, 0, 0])), tensors)
    assert_same(ours, run(op(2, torch.tensor([40, 0, 0])), tensors))
    assert ours[0][0][0].isfinite().all() and ours[1][0][0].isfinite().all()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("eps", [None, EPS], ids=["", "norm"])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def check_opcheck(eps, lengths):
    module = importlib.import_module("pinclip.ops.attention_pool")
    tensors = [t.requires_grad_() for t in problem(2, 24, 5, 40, torch.float16)]
    opcheck(module._attention_pool, (*tensors, 2, lengths, eps))


@pytest.mark.usefixtures("kernels")
def check_large_scores():
    """Logits of some hundred, far apart: the softmax is one token or a few. The greatest error is then the
    rounding of u, which the standard form does not have."""

    def absorbed(x, q, w_k, b_k, w_v, b_v):
        q_heads, k_heads, v_heads = (t.unflatten(d, (2, -1)) for t, d in ((q, 1), (w_k, 0), (w_v, 0)))
        u = torch.einsum("phe,hed->phd", q_heads, k_heads) * q_heads.shape[2] ** -0.5
        p = torch.einsum("bnd,phd->bphn", x, u).softmax(-1)
        z = torch.einsum("bphn,bnd->bphd", p, x)
        return torch.einsum("bphd,hed->bphe", z, v_heads).flatten(2) + b_v

    x, q, *weights = problem(1, 16, 3, 70, torch.float16)
    assert_as_exact_as(op(2), absorbed, truth(2), (x, q * 100, *weights))


@pytest.mark.usefixtures("kernels")
def check_tokens_far_from_zero():
    """A mean 30 times the spread: statistics and products do not lose it."""
    x, *others = with_norm(problem(1, 48, 3, 40, torch.float16))
    assert_as_exact_as(op(2), standard(2), truth(2), (x + 30, *others))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def check_compile_checkpoint_strides_repeat(norm):
    tensors = problem(2, 24, 3, 40, torch.float16)
    assert_survives(op(2, LENGTHS[:3]), with_norm(tensors) if norm else tensors)


# Compiled for a GPU that is not there ---------------------------------------------------------------------


def test_compiles_within_budget():
    from pinclip_kernels.triton.attention_pool import compile_cases

    names = [f"_pool_{way}_kernel/standardize/bf16/D1152" for way in ("forward", "backward")]
    assert_cases(compile_cases(), [(name, 90) for name in names])


def test_which_shapes_the_kernels_take():
    from pinclip_kernels.triton.attention_pool import limits

    assert limits(torch.bfloat16, 90) == limits(torch.float16, 100) == (16, 1152)
    assert limits(torch.float32, 90) == limits(torch.bfloat16, 80) == limits(torch.bfloat16, 120) == (0, 0)


# On a GPU -------------------------------------------------------------------------------------------------


class TestGpu:
    """Where the kernels do not run (fewer than sm_90, fp32), the same tests hold for the composed form."""

    pytestmark = pytest.mark.gpu

    @staticmethod
    def problem(*sizes, dtype=torch.bfloat16, norm=False):
        tensors = problem(*sizes, dtype)
        return [t.cuda() for t in (with_norm(tensors) if norm else tensors)]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
    @pytest.mark.parametrize(
        "probes,heads,width,batch,tokens",
        [
            (1, 16, 1152, 200, 256),
            (1, 12, 768, 64, 196),
            (1, 16, 1024, 3, 577),
            (5, 3, 192, 300, 65),
            (8, 16, 1152, 4, 50),  # too many rows for the kernels
            (1, 2, 100, 5, 2),
        ],
    )
    def test_error(self, probes, heads, width, batch, tokens, norm, dtype):
        torch.backends.cuda.matmul.allow_tf32 = False
        tensors = self.problem(probes, width, batch, tokens, dtype=dtype, norm=norm)
        assert_as_exact_as(op(heads), standard(heads), truth(heads), tensors)

    @pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
    def test_padding(self, norm):
        lengths = torch.arange(40, device="cuda") * 7 % 198
        tensors = self.problem(1, 768, 40, 197, norm=norm)
        padding = torch.arange(197, device="cuda") >= lengths[:, None]
        tensors[0] = tensors[0].masked_fill(padding[..., None], float("nan"))
        ours = run(op(12, lengths), tensors)
        assert (ours[0][0][lengths == 0] == 0).all() and (ours[1][0][padding] == 0).all()
        tensors[0] = tensors[0].masked_fill(padding[..., None], 0.0)
        there = lengths > 0

        def of_rows(function):
            return lambda x, *rest: function(x[there], *rest)

        functions = (of_rows(f(12, lengths[there])) for f in (op, standard, truth))
        assert_same(ours, run(op(12, lengths), tensors))
        assert_as_exact_as(*functions, tensors)

    @pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
    def test_survives_and_repeats(self, norm):
        assert_survives(op(12), self.problem(1, 768, 9, 65, dtype=torch.float16, norm=norm))
        assert_repeats(op(16), self.problem(1, 1152, 300, 256, norm=norm), times=20)

    def test_autocast(self):
        assert_autocast(op(12), self.problem(1, 768, 8, 196, norm=True), torch.bfloat16)

    def test_cuda_graph_without_waiting(self):
        tensors = self.problem(1, 768, 64, 196, norm=True)
        assert_captured(op(12), tensors)
        assert_does_not_wait(op(12), tensors)
