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

import pinclip.ops.contrastive as op
from pinclip.ops.contrastive import contrastive_loss
from pinclip.ops.pairs import Pairs
from pinclip.reference.contrastive import contrastive_loss as reference

KINDS = list(pair_kinds(3, 3))
DIRECTIONS = ("symmetric", "rows", "columns")


def compare(x, y, scale, pairs, **options):
    """Kernel, plain torch and truth from the same inputs; returns the kernel's results."""
    narrow, wide = cast(pairs, torch.float32), cast(pairs, torch.float64)
    scale = torch.tensor(scale, device=x.device)
    ours = value_and_grads(lambda *a: contrastive_loss(*a, narrow, **options), x, y, scale)
    plain = value_and_grads(lambda *a: reference(*a, narrow, **options), x, y, scale)
    truth = value_and_grads(lambda *a: reference(*a, wide, **options), x.double(), y.double(), scale.double())
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
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def check_equals_reference(kind, direction):
    m, n = 65, 129
    compare(*embeddings(m, n, dtype=torch.float32), 14.3, pair_kinds(m, n)[kind], direction=direction)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["diagonal", "all"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 1e4])
def check_error(scale, kind, dtype):
    m, n = 129, 127  # several tiles, ragged ones, and D no multiple of 8
    compare(*embeddings(m, n, 100, dtype=dtype), scale, pair_kinds(m, n)[kind])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65])  # degenerate softmax; one tile, exactly and not
def check_sizes(n):
    for d in (16, 256):
        compare(*embeddings(n, n, d, dtype=torch.float16), 14.3, pair_kinds(n, n)["all"])


@pytest.mark.usefixtures("pointers")
@pytest.mark.parametrize("direction", ["symmetric", "columns"])
def check_chunks_do_not_matter(direction, monkeypatch):
    from pinclip_kernels.triton import _pair_tile, contrastive

    m, n = 200, 130
    x, y = embeddings(m, n, dtype=torch.float32)
    whole = compare(x, y, 14.3, pair_kinds(m, n)["all"], direction=direction)
    monkeypatch.setattr(contrastive, "_STATISTICS_ROWS", 64)
    monkeypatch.setattr(_pair_tile.ChunkGradients, "_ROWS", 64)
    cut = compare(x, y, 14.3, pair_kinds(m, n)["all"], direction=direction)
    assert_close(cut, whole, rtol=1e-6)


@pytest.mark.usefixtures("pointers")
@pytest.mark.parametrize("turned", [False, True], ids=["row", "column"])
@pytest.mark.parametrize("scale", [100.0, 300.0])  # beyond 90 bits, and beyond what fp32 holds
def check_far_below_the_rest_of_a_tile(scale, turned):
    """Sums of shared exponentials vanish in all rows (columns) but the first, in no column (row)."""
    x, y = embeddings(70, 70, dtype=torch.float32)
    y = torch.nn.functional.normalize(y + 3 * x[0], dim=1)
    x[1:] = torch.nn.functional.normalize(x[1:] - x[0], dim=1)
    indptr, indices = csr([[i] if i else [] for i in range(70)])
    compare(*(y, x) if turned else (x, y), scale, Pairs(indptr=indptr, indices=indices))


@pytest.mark.usefixtures("pointers")
def check_gradient_of_a_learnt_pair():
    """P is near 1: in fp16, P - 1 must not be formed from a rounded P."""
    x, _ = embeddings(64, 64, 64, dtype=torch.float16)
    loss, dx, *_ = compare(x, x, 12.0, Pairs())
    wide = value_and_grads(
        lambda *a: reference(*a, Pairs()), x.double(), x.double(), torch.tensor(12.0).double()
    )
    assert wide[1].abs().max() > 0 and loss < 0.1
    assert (dx.double() - wide[1]).norm() <= 2e-3 * wide[1].norm()


@pytest.mark.usefixtures("pointers")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def check_nan_and_inf_propagate_as_in_the_reference(poison, direction):
    x, y = embeddings(70, 70, dtype=torch.float32)
    x[5, 2] = poison
    args = (x, y, torch.tensor(3.0))
    ours = value_and_grads(lambda *a: contrastive_loss(*a, Pairs(), direction=direction), *args)
    truth = value_and_grads(lambda *a: reference(*a, Pairs(), direction=direction), *args)
    assert not ours[0].isfinite()
    for a, e in zip(ours, truth):
        assert torch.equal(a.isfinite(), e.isfinite())


@pytest.mark.usefixtures("pointers")
def check_row_with_all_negatives_masked_has_no_loss():
    m, n = 65, 70
    known = csr([[c for c in range(n) if c != 3] if r == 3 else [] for r in range(m)])
    pairs = Pairs(known_indptr=known[0], known_indices=known[1], row_weights=(torch.arange(m) == 3).float())
    args = (*embeddings(m, n, dtype=torch.float32), torch.tensor(100.0))
    for value in value_and_grads(lambda *a: contrastive_loss(*a, pairs, direction="rows"), *args):
        assert value.abs().max() == 0


@pytest.mark.usefixtures("pointers")
def check_nothing_is_positive():
    x, y = embeddings(4, 5, dtype=torch.float32)
    for pairs in (Pairs(offset=9), Pairs(row_weights=torch.zeros(4), col_weights=torch.zeros(5))):
        for value in value_and_grads(lambda *a, p=pairs: contrastive_loss(*a, p), x, y, torch.tensor(2.0)):
            assert value.abs().max() == 0


@pytest.mark.usefixtures("pointers")
def check_removed_items_get_no_gradient_and_change_nothing():
    x, y = embeddings(66, 66, dtype=torch.float32)
    keep = torch.arange(66) % 3 != 0
    gone = torch.where(keep, 0.0, torch.inf)
    pairs = Pairs(log_q_cols=gone, log_q_rows=gone, row_weights=keep.float(), col_weights=keep.float())
    loss, dx, dy, dscale = value_and_grads(lambda *a: contrastive_loss(*a, pairs), x, y, torch.tensor(5.0))
    assert dx[~keep].abs().max() == 0 and dy[~keep].abs().max() == 0
    small = value_and_grads(contrastive_loss, x[keep], y[keep], torch.tensor(5.0))
    assert_close([loss, dx[keep], dy[keep], dscale], small, rtol=1e-6)


@pytest.mark.usefixtures("pointers")
def check_only_what_is_asked_for_gets_a_gradient():
    x, y = embeddings(66, 66, dtype=torch.float32)
    full = value_and_grads(contrastive_loss, x, y, torch.tensor(3.0), upstream=1.0)
    for which in range(3):
        inputs = [x, y, torch.tensor(3.0)]
        inputs[which] = inputs[which].clone().requires_grad_()
        (grad,) = torch.autograd.grad(contrastive_loss(*inputs), inputs[which])
        assert torch.equal(grad, full[1 + which])


@pytest.mark.usefixtures("pointers")
def check_autocast_does_not_lower_the_precision():
    args = (*embeddings(66, 70, dtype=torch.float32), torch.tensor(14.3))
    plain = value_and_grads(contrastive_loss, *args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = value_and_grads(contrastive_loss, *args)
    assert all(torch.equal(a, b) for a, b in zip(mixed, plain))


# Taken together: whole blocks of 64 features, not all of D. Taken one by one: no whole blocks; one twice.
PREFIXES = [
    *(((192, 64, 128), "all", direction) for direction in DIRECTIONS),
    ((64, 192), "negative_offset", "symmetric"),
    ((64,), "all", "symmetric"),
    ((20, 100), "all", "symmetric"),
    ((64, 64), "all", "columns"),
]


@pytest.mark.usefixtures("pointers")
@pytest.mark.parametrize("dims,kind,direction", PREFIXES, ids=str)
def check_prefixes(dims, kind, direction):
    x, y = uneven_embeddings(70, 150, 200, dtype=torch.float16)
    compare(x, y, 14.3, pair_kinds(70, 150)[kind], direction=direction, dims=dims)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def check_error_of_prefixes(scale, dtype):
    compare(
        *uneven_embeddings(129, 127, 128, dtype=dtype), scale, pair_kinds(129, 127)["all"], dims=(64, 128)
    )


@pytest.mark.usefixtures("pointers")
@pytest.mark.parametrize("scale", [100.0, 300.0])
def check_prefixes_far_below_the_rest_of_a_tile(scale):
    """As above; tiles are taken again for the second prefix and not for the first."""
    x, y = embeddings(70, 70, 64, dtype=torch.float32)
    y = torch.nn.functional.normalize(y + 3 * x[0], dim=1)
    x[1:] = torch.nn.functional.normalize(x[1:] - x[0], dim=1)
    before = embeddings(70, 70, 64, dtype=torch.float32, seed=1)
    x, y = (torch.cat([0.05 * one, other], 1) for one, other in zip(before, (x, y)))
    indptr, indices = csr([[i] if i else [] for i in range(70)])
    for args in ((x, y), (y, x)):
        compare(*args, scale, Pairs(indptr=indptr, indices=indices), dims=(64, 128))


@pytest.mark.usefixtures("pointers")
def check_chunks_do_not_matter_to_prefixes(monkeypatch):
    from pinclip_kernels.triton import _pair_tile, contrastive

    x, y = embeddings(200, 130, 128, dtype=torch.float32)
    whole = compare(x, y, 14.3, pair_kinds(200, 130)["all"], dims=(64, 128))
    monkeypatch.setattr(contrastive, "_STATISTICS_ROWS", 128)
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

# The symmetric loss with everything on; `compile_cases` has all other cases.
COMPILED = [
    ("statistics_kernel/shared/all/bf16", 90),
    ("statistics_kernel/shared/all/bf16", 80),
    ("gradient_kernel/shared/all/bf16", 90),
    ("gradient_kernel/shared/all/bf16", 80),
    ("gradient_kernel/shared/all/fp32", 90),
    ("statistics_kernel/shared/prefixes_all/bf16", 90),
    ("gradient_kernel/shared/prefixes_all/bf16", 90),
    ("gradient_kernel/shared/prefixes_all/bf16", 80),
]


@pytest.mark.parametrize("name,arch", COMPILED)
def test_compiles_within_budget(name, arch):
    from pinclip_kernels.triton.contrastive import compile_cases

    (case,) = (each for each in compile_cases() if each.name == f"_{name}/sm_{arch}")
    assert_within_budget(case, arch)


def test_cases_cover_the_launch_table():
    from pinclip_kernels.triton.contrastive import compile_cases

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

    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_equals_reference(self, kind, direction):
        x, y, pairs = self.problem(1000, 1003, 512, kind=kind)
        compare(x, y, 14.3, pairs, direction=direction)

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
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("dims", [(64, 128, 256, 512), (100, 512), (64, 192)], ids=str)
    def test_prefixes(self, dims, direction, kind, dtype):
        x, y, pairs = self.problem(1000, 1003, 512, dtype, kind)
        for scale in (14.3, 100.0):
            compare(x, y, scale, pairs, direction=direction, dims=dims)

    @pytest.mark.parametrize("d", [512, 768, 1152])
    def test_ragged_and_large(self, d):
        """Against the tiles in fp64, as the reference does not fit."""
        n = 32731
        x, y, pairs = self.problem(n, n, d)
        scale = torch.tensor(100.0, device="cuda")
        ours = value_and_grads(lambda *a: contrastive_loss(*a, pairs), x, y, scale)
        truth = value_and_grads(
            lambda *a: contrastive_loss(*a, pairs), x.double(), y.double(), scale.double()
        )
        plain = value_and_grads(lambda *a: contrastive_loss(*a, pairs), x.float(), y.float(), scale)
        plain[1:3] = (each.to(x.dtype) for each in plain[1:3])
        assert_as_exact(ours, plain, truth)

    @pytest.mark.parametrize("dims", [None, (64, 512)])
    def test_repeats_bit_for_bit(self, dims):
        x, y, pairs = self.problem(5000, 5003, 512, kind="all")
        scale = torch.tensor(100.0, device="cuda")
        first, *others = (
            value_and_grads(lambda *a: contrastive_loss(*a, pairs, dims=dims), x, y, scale) for _ in range(5)
        )
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other))

    @pytest.mark.parametrize("kind", ["diagonal", "all"])
    def test_cuda_graph(self, kind):
        x, y, pairs = self.problem(1000, 1003, 512, kind=kind)
        inputs = [*leaves(x, y), torch.tensor(14.3, device="cuda", requires_grad=True)]

        def step():
            loss = contrastive_loss(*inputs, pairs)
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
        scale = torch.tensor(14.3, device="cuda")
        value_and_grads(lambda *a: contrastive_loss(*a, pairs, dims=dims), x, y, scale)
        torch.cuda.set_sync_debug_mode("error")
        try:
            value_and_grads(lambda *a: contrastive_loss(*a, pairs, dims=dims), x, y, scale)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_compiles_as_one_graph(self):
        x, y, pairs = self.problem(1000, 1003, 256, kind="all")
        args = (x, y, torch.tensor(14.3, device="cuda"))

        def loss(*a):
            return contrastive_loss(*a, pairs, dims=(64, 256)) + contrastive_loss(*a, pairs)

        assert_close(
            value_and_grads(torch.compile(loss, fullgraph=True), *args), value_and_grads(loss, *args), 1e-5
        )

    def test_opcheck(self):
        x, y, pairs = self.problem(60, 70, 32, kind="all")
        seen = []

        class Spy(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func is torch.ops.pinclip.contrastive.default:
                    seen.append(args)
                return func(*args, **(kwargs or {}))

        with Spy():
            contrastive_loss(x, y, torch.tensor(5.0, device="cuda"), pairs)
        torch.library.opcheck(torch.ops.pinclip.contrastive.default, seen[0])

    def test_memory(self):
        """N = 131072, D = 512 beyond inputs and gradients: at most 1.5 GB."""
        n, d = 131072, 512
        x, y = (
            torch.nn.functional.normalize(torch.randn(n, d, device="cuda"), dim=1).bfloat16().requires_grad_()
            for _ in "xy"
        )
        scale = torch.tensor(100.0, device="cuda", requires_grad=True)
        contrastive_loss(x[:512], y[:512], scale).backward()  # the BLAS takes its workspace
        for tensor in (x, y, scale):
            tensor.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contrastive_loss(x, y, scale).backward()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - 2 * x.numel() * x.element_size()
        assert extra <= 1.5e9, f"{extra / 1e9:.2f} GB"
