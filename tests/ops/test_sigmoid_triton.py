import pytest
import torch
from pair_cases import (
    assert_close,
    cast,
    csr,
    embeddings,
    leaves,
    pair_kinds,
    uneven_embeddings,
    value_and_grads,
)
from triton_cases import assert_as_exact, assert_within_budget, interpret, use_kernels

import pinclip.ops.sigmoid as op
from pinclip.ops.pairs import Pairs
from pinclip.ops.sigmoid import sigmoid_loss
from pinclip.reference.sigmoid import sigmoid_loss as reference

KINDS = list(pair_kinds(3, 3))
BIAS = -3.0


def compare(x, y, scale, pairs, bias=BIAS, **options):
    """Kernel, plain torch and truth from the same inputs; returns the kernel's results."""
    narrow, wide = cast(pairs, torch.float32), cast(pairs, torch.float64)
    args = x, y, torch.tensor(scale, device=x.device), torch.tensor(bias, device=x.device)
    ours = value_and_grads(lambda *a: sigmoid_loss(*a, narrow, **options), *args)
    plain = value_and_grads(lambda *a: reference(*a, narrow, **options), *args)
    truth = value_and_grads(lambda *a: reference(*a, wide, **options), *(t.double() for t in args))
    assert_as_exact(ours, plain, truth)
    return ours


def test_in_the_interpreter():
    interpret(__file__)


# In the interpreter ---------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def kernels(request, monkeypatch):
    use_kernels(monkeypatch, op, request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def pointers(monkeypatch):
    use_kernels(monkeypatch, op)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("pointers")
@pytest.mark.parametrize("kind", KINDS)
def check_equals_reference(kind):
    m, n = 65, 129
    compare(*embeddings(m, n, dtype=torch.float32), 14.3, pair_kinds(m, n)[kind])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["diagonal", "all"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 1e4])
def check_error(scale, kind, dtype):
    m, n = 129, 127  # several tiles, ragged ones, and D no multiple of 8
    compare(*embeddings(m, n, 100, dtype=dtype), scale, pair_kinds(m, n)[kind])


@pytest.mark.usefixtures("pointers")
@pytest.mark.parametrize("bias", [-40.0, -16.0, 0.0, 30.0])  # losses from 1e-17 a pair to one linear in S
def check_bias(bias):
    compare(*embeddings(70, 66, 16, dtype=torch.float32), 10.0, pair_kinds(70, 66)["all"], bias)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65])  # one tile, exactly and not
def check_sizes(n):
    for d in (16, 256):
        compare(*embeddings(n, n, d, dtype=torch.float16), 14.3, pair_kinds(n, n)["all"])


@pytest.mark.usefixtures("pointers")
def check_chunks_do_not_matter(monkeypatch):
    from pinclip_kernels.triton import _pair_tile, sigmoid

    m, n = 200, 130
    x, y = embeddings(m, n, dtype=torch.float32)
    whole = compare(x, y, 14.3, pair_kinds(m, n)["all"])
    monkeypatch.setattr(sigmoid, "_VALUE_ROWS", 64)
    monkeypatch.setattr(_pair_tile.ChunkGradients, "_ROWS", 64)
    assert_close(compare(x, y, 14.3, pair_kinds(m, n)["all"]), whole, rtol=1e-6)
    value = sigmoid_loss(x, y, 14.3, BIAS, cast(pair_kinds(m, n)["all"], torch.float32))
    assert_close([value], whole, rtol=1e-6)


@pytest.mark.usefixtures("pointers")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def check_nan_and_inf_propagate_as_in_the_reference(poison):
    x, y = embeddings(70, 70, dtype=torch.float32)
    x[5, 2] = poison
    args = (x, y, torch.tensor(3.0), torch.tensor(BIAS))
    ours, truth = (value_and_grads(f, *args) for f in (sigmoid_loss, lambda *a: reference(*a, Pairs())))
    assert not ours[0].isfinite()
    for a, e in zip(ours, truth):
        assert torch.equal(a.isfinite(), e.isfinite())


@pytest.mark.usefixtures("pointers")
def check_row_with_all_negatives_masked_keeps_its_positive():
    m, n = 65, 70
    known = csr([[c for c in range(n) if c != 3] if r == 3 else [] for r in range(m)])
    pairs = Pairs(known_indptr=known[0], known_indices=known[1], row_weights=(torch.arange(m) == 3).float())
    _, dx, *_ = compare(*embeddings(m, n, dtype=torch.float32), 5.0, pairs)
    assert dx[3].abs().max() > 0 and dx[:3].abs().max() == 0


@pytest.mark.usefixtures("pointers")
def check_nothing_is_positive():
    x, y = embeddings(4, 5, dtype=torch.float32)
    for pairs in (Pairs(offset=9), Pairs(row_weights=torch.zeros(4))):
        args = (x, y, torch.tensor(2.0), torch.tensor(1.0))
        for value in value_and_grads(lambda *a, p=pairs: sigmoid_loss(*a, p), *args):
            assert value.abs().max() == 0


@pytest.mark.usefixtures("pointers")
def check_removed_items_get_no_gradient_and_change_nothing():
    x, y = embeddings(66, 66, dtype=torch.float32)
    keep = torch.arange(66) % 3 != 0
    pairs = Pairs(log_q_cols=torch.where(keep, 0.0, torch.inf), row_weights=keep.float())
    rest = (torch.tensor(5.0), torch.tensor(BIAS))
    loss, dx, dy, *scalars = value_and_grads(lambda *a: sigmoid_loss(*a, pairs), x, y, *rest)
    assert dx[~keep].abs().max() == 0 and dy[~keep].abs().max() == 0
    small = value_and_grads(sigmoid_loss, x[keep], y[keep], *rest)
    assert_close([loss, dx[keep], dy[keep], *scalars], small, rtol=1e-6)


@pytest.mark.usefixtures("pointers")
def check_only_what_is_asked_for_gets_a_gradient():
    x, y = embeddings(66, 66, dtype=torch.float32)
    rest = (torch.tensor(3.0), torch.tensor(BIAS))
    full = value_and_grads(sigmoid_loss, x, y, *rest, upstream=1.0)
    for which in range(4):
        inputs = [x, y, *rest]
        inputs[which] = inputs[which].clone().requires_grad_()
        (grad,) = torch.autograd.grad(sigmoid_loss(*inputs), inputs[which])
        assert torch.equal(grad, full[1 + which])


@pytest.mark.usefixtures("pointers")
def check_autocast_does_not_lower_the_precision():
    args = (*embeddings(66, 70, dtype=torch.float32), torch.tensor(14.3), torch.tensor(BIAS))
    plain = value_and_grads(sigmoid_loss, *args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = value_and_grads(sigmoid_loss, *args)
    assert all(torch.equal(a, b) for a, b in zip(mixed, plain))


# Taken together: whole blocks of 64 features, not all of D. Taken one by one: no whole blocks; one twice.
PREFIXES = [(192, 64, 128), (64,), (20, 100), (64, 64)]


@pytest.mark.usefixtures("pointers")
@pytest.mark.parametrize("kind", ["negative_offset", "all"])
@pytest.mark.parametrize("dims", PREFIXES, ids=str)
def check_prefixes(dims, kind):
    x, y = uneven_embeddings(70, 150, 200, dtype=torch.float16)
    pairs = pair_kinds(70, 150)[kind]
    whole = compare(x, y, 14.3, pairs, dims=dims)
    value = sigmoid_loss(x, y, 14.3, BIAS, cast(pairs, torch.float32), dims=dims)
    assert_close([value], whole, rtol=1e-6)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def check_error_of_prefixes(scale, dtype):
    x, y = uneven_embeddings(129, 127, 128, dtype=dtype)
    compare(x, y, scale, pair_kinds(129, 127)["all"], dims=(64, 128))


@pytest.mark.usefixtures("pointers")
def check_chunks_do_not_matter_to_prefixes(monkeypatch):
    from pinclip_kernels.triton import _pair_tile, sigmoid

    x, y = embeddings(200, 130, 128, dtype=torch.float32)
    whole = compare(x, y, 14.3, pair_kinds(200, 130)["all"], dims=(64, 128))
    monkeypatch.setattr(sigmoid, "_VALUE_ROWS", 64)
    monkeypatch.setattr(_pair_tile.ChunkGradients, "_ROWS", 64)
    cut = compare(x, y, 14.3, pair_kinds(200, 130)["all"], dims=(64, 128))
    assert_close(cut, whole, rtol=1e-6)


@pytest.mark.usefixtures("kernels")
def check_matryoshka_strides_and_repeatability():
    x, y = embeddings(70, 66, 128, dtype=torch.float16)
    pairs = pair_kinds(70, 66)["all"]
    for dims in ((8, 20), (64, 128)):
        first, second = (compare(x, y, 14.3, pairs, dims=dims) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))
    first = compare(x, y, 14.3, pairs)
    spread = compare(torch.stack([x, x], 2)[..., 0], y.T.contiguous().T, 14.3, pairs)
    assert all(torch.equal(a, b) for a, b in zip(first, spread))


# Compiled for a GPU that is not there ---------------------------------------------------------------------


COMPILED = [
    ("all/bf16", 90),
    ("all/bf16", 80),
    ("all/fp32", 90),
    ("prefixes_plain/bf16", 90),
    ("prefixes_all/bf16", 90),
    ("prefixes_all/bf16", 80),
]


@pytest.mark.parametrize("variant,arch", COMPILED)
def test_compiles_within_budget(variant, arch):
    from pinclip_kernels.triton.sigmoid import compile_cases

    name = f"_sigmoid_kernel/gradient/{variant}/sm_{arch}"
    (case,) = (each for each in compile_cases() if each.name == name)
    assert_within_budget(case, arch)


def test_cases_cover_the_launch_table():
    from pinclip_kernels.triton.sigmoid import compile_cases

    cases = compile_cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert set(case.signature) == set(case.kernel.arg_names)
        assert {k for k, v in case.signature.items() if v == "constexpr"} == set(case.constexprs)


# On a GPU -------------------------------------------------------------------------------------------------


class TestGpu:
    pytestmark = pytest.mark.gpu

    @pytest.fixture(autouse=True)
    def exact_products(self):
        """fp32 products of plain torch are not taken in tf32."""
        torch.backends.cuda.matmul.allow_tf32 = False

    @staticmethod
    def problem(m, n, d, dtype=torch.bfloat16, kind="diagonal"):
        x, y = (t.cuda() for t in embeddings(m, n, d, dtype=dtype))
        pairs = cast(pair_kinds(m, n)[kind], torch.float32)
        fields = {k: getattr(pairs, k) for k in pairs.__dataclass_fields__}
        return x, y, Pairs(**{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in fields.items()})

    @staticmethod
    def scalars(scale):
        return torch.tensor(scale, device="cuda"), torch.tensor(BIAS, device="cuda")

    @pytest.mark.parametrize("kind", KINDS)
    def test_equals_reference(self, kind):
        x, y, pairs = self.problem(1000, 1003, 512, kind=kind)
        compare(x, y, 14.3, pairs)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("kind", ["diagonal", "all"])
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 14.3, 100.0, 1e4])
    def test_error(self, scale, kind, dtype):
        for n, d in ((1000, 100), (4096, 512)):
            x, y, pairs = self.problem(n, n, d, dtype, kind)
            compare(x, y, scale, pairs)

    @pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 129])
    @pytest.mark.parametrize("d", [16, 100, 256, 768, 1152, 2048])
    def test_sizes(self, n, d):
        x, y, pairs = self.problem(n, n, d)
        compare(x, y, 14.3, pairs)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("kind", ["diagonal", "all"])
    @pytest.mark.parametrize("dims", [(64, 128, 256, 512), (100, 512), (64, 192)], ids=str)
    def test_prefixes(self, dims, kind, dtype):
        x, y, pairs = self.problem(1000, 1003, 512, dtype, kind)
        for scale in (14.3, 100.0):
            compare(x, y, scale, pairs, dims=dims)

    @pytest.mark.parametrize("d", [512, 768, 1152])
    def test_ragged_and_large(self, d):
        """Against the tiles in fp64, as the reference does not fit."""
        x, y, pairs = self.problem(32731, 32731, d)
        args = x, y, *self.scalars(100.0)
        ours = value_and_grads(lambda *a: sigmoid_loss(*a, pairs), *args)
        truth = value_and_grads(lambda *a: sigmoid_loss(*a, pairs), *(t.double() for t in args))
        plain = value_and_grads(lambda *a: sigmoid_loss(*a, pairs), *(t.float() for t in args))
        plain[1:3] = (each.to(x.dtype) for each in plain[1:3])
        assert_as_exact(ours, plain, truth)

    @pytest.mark.parametrize("dims", [None, (64, 512)])
    def test_repeats_bit_for_bit(self, dims):
        x, y, pairs = self.problem(5000, 5003, 512, kind="all")
        args = x, y, *self.scalars(100.0)
        first, *others = (
            value_and_grads(lambda *a: sigmoid_loss(*a, pairs, dims=dims), *args) for _ in range(5)
        )
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other))

    @pytest.mark.parametrize("kind", ["diagonal", "all"])
    def test_cuda_graph(self, kind):
        x, y, pairs = self.problem(1000, 1003, 512, kind=kind)
        inputs = leaves(x, y, *self.scalars(14.3))

        def step():
            loss = sigmoid_loss(*inputs, pairs)
            return [loss, *torch.autograd.grad(loss, inputs)]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            inputs[0].copy_(inputs[0].flip(0))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step()))

    @pytest.mark.parametrize("dims", [None, (64, 512)])
    def test_does_not_wait_for_the_gpu(self, dims):
        x, y, pairs = self.problem(1000, 1003, 512, kind="all")
        args = x, y, *self.scalars(14.3)
        value_and_grads(lambda *a: sigmoid_loss(*a, pairs, dims=dims), *args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            value_and_grads(lambda *a: sigmoid_loss(*a, pairs, dims=dims), *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_compiles_as_one_graph(self):
        x, y, pairs = self.problem(1000, 1003, 256, kind="all")
        args = x, y, *self.scalars(14.3)

        def loss(*a):
            return sigmoid_loss(*a, pairs, dims=(64, 256)) + sigmoid_loss(*a, pairs)

        compiled = value_and_grads(torch.compile(loss, fullgraph=True), *args)
        assert_close(compiled, value_and_grads(loss, *args), rtol=1e-5)

    def test_memory(self):
        """N = 131072, D = 512 beyond inputs and gradients: at most 1.5 GB."""
        n, d = 131072, 512
        x, y = (
            torch.nn.functional.normalize(torch.randn(n, d, device="cuda"), dim=1).bfloat16().requires_grad_()
            for _ in "xy"
        )
        scale, bias = leaves(*self.scalars(100.0))
        sigmoid_loss(x[:512], y[:512], scale, bias).backward()  # the BLAS takes its workspace
        for tensor in (x, y, scale, bias):
            tensor.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sigmoid_loss(x, y, scale, bias).backward()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - 2 * x.numel() * x.element_size()
        assert extra <= 1.5e9, f"{extra / 1e9:.2f} GB"
