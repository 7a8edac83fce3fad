import functools
import subprocess
import sys

import open_clip.loss
import pytest
import torch
from pair_cases import (
    PREFIXES,
    SCALES,
    SIZES,
    Errors,
    assert_close,
    cast,
    csr,
    embeddings,
    leaves,
    pair_kinds,
    uneven_embeddings,
    value_and_grads,
)

import pinclip.ops._pair_tiles as pair_tiles
from pinclip.ops.contrastive import (
    contrastive_loss,
    merge_statistics,
    sides,
    softmax_gradients,
    softmax_loss,
    softmax_statistics,
)
from pinclip.ops.pairs import Pairs, coefficients
from pinclip.reference.contrastive import contrastive_loss as reference

DIRECTIONS = ("symmetric", "rows", "columns")
KINDS = list(pair_kinds(3, 3))


@pytest.fixture(params=[(64, 64), (1024, 1024)], ids=["small_tiles", "one_tile"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(pair_tiles, "TILE", request.param)


def fp64(value):
    return torch.tensor(value, dtype=torch.float64)


# The reference itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_reference_gradcheck(kind, direction):
    x, y = embeddings(5, 6, 4)
    pairs = pair_kinds(5, 6)[kind]
    dims = (2, 4) if kind == "all" else None

    def loss(x, y, scale):
        return reference(x, y, scale, pairs, direction=direction, dims=dims)

    assert torch.autograd.gradcheck(loss, (*leaves(x, y), fp64(3.0).requires_grad_()))


def test_reference_by_hand():
    """Two rows, three columns, every feature, written out term by term."""
    x, y = embeddings(2, 3, 4)
    s = (5.0 * x @ y.T).tolist()
    q = [0.1, -0.2, 0.3]
    pairs = Pairs(
        indptr=torch.tensor([0, 2, 3]),
        indices=torch.tensor([0, 2, 1]),
        weights=fp64([1.0, 3.0, 2.0]),
        row_ids=torch.tensor([4, 5]),
        col_ids=torch.tensor([4, 4, 5]),  # masks (0, 1) and (1, 2); (0, 0) is listed, so it stays
        log_q_cols=fp64(q),
        row_weights=fp64([2.0, 0.5]),
    )
    s = [[s[i][j] - q[j] for j in range(3)] for i in range(2)]
    lse = [fp64([s[0][0], s[0][2]]).logsumexp(0), fp64([s[1][0], s[1][1]]).logsumexp(0)]
    first = (1.0 * (lse[0] - s[0][0]) + 3.0 * (lse[0] - s[0][2])) / 4.0
    second = lse[1] - s[1][1]
    expected = (2.0 * first + 0.5 * second) / 2.5
    for loss in (reference, contrastive_loss):
        assert_close([loss(x, y, 5.0, pairs, direction="rows")], [expected])


# Tiles against the reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("tiles")
def test_equals_reference(kind, direction):
    for m, n in SIZES:
        x, y = embeddings(m, n)
        pairs = pair_kinds(m, n)[kind]

        def ours(x, y, scale, pairs=pairs):
            return contrastive_loss(x, y, scale, pairs, direction=direction)

        def truth(x, y, scale, pairs=pairs):
            return reference(x, y, scale, pairs, direction=direction)

        assert_close(value_and_grads(ours, x, y, fp64(14.3)), value_and_grads(truth, x, y, fp64(14.3)))


@pytest.mark.parametrize("kind", ["diagonal", "all"])
@pytest.mark.parametrize("scale", SCALES)
def test_error_is_at_most_twice_that_of_plain_torch(scale, kind, monkeypatch):
    monkeypatch.setattr(pair_tiles, "TILE", (64, 64))
    m, n, d = 129, 127, 100
    for dtype in (torch.float32, torch.bfloat16):
        errors = Errors()
        for seed in range(8):
            x, y = embeddings(m, n, d, dtype=dtype, seed=seed)
            s = torch.tensor(scale)
            pairs = cast(pair_kinds(m, n)[kind], torch.float32)
            exact = cast(pairs, torch.float64)
            errors.add(
                value_and_grads(lambda *a, p=pairs: contrastive_loss(*a, p), x, y, s),
                value_and_grads(lambda *a, p=pairs: reference(*a, p), x, y, s),
                value_and_grads(lambda *a, p=exact: reference(*a, p), x.double(), y.double(), s.double()),
            )
        errors.check(torch.finfo(dtype).eps)


@pytest.mark.parametrize("normalizer", [None, 3.5, fp64(3.5)])
def test_normalizer_and_matryoshka(normalizer):
    """The loss over prefixes is the mean of the separate losses of renormalised prefixes."""
    x, y = embeddings(20, 30, 16)
    pairs = pair_kinds(20, 30)["all"]
    options = {"direction": "symmetric", "normalizer": normalizer}

    def fused(x, y, s):
        return contrastive_loss(x, y, s, pairs, dims=(4, 8, 16), **options)

    def separate(x, y, s):
        unit = torch.nn.functional.normalize
        each = [reference(unit(x[:, :d]), unit(y[:, :d]), s, pairs, **options) for d in (4, 8, 16)]
        return sum(each) / 3

    args = (2 * x, 3 * y, fp64(7.0))
    assert_close(value_and_grads(fused, *args), value_and_grads(separate, *args))
    assert_close([reference(*args, pairs, dims=(4, 8, 16), **options)], [fused(*args)])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("tiles")
def test_prefixes_equal_reference(kind, direction):
    for m, n in [(1, 3), (65, 63), (64, 129), (129, 127)]:
        options = {"pairs": pair_kinds(m, n)[kind], "direction": direction, "dims": PREFIXES}
        args = (*uneven_embeddings(m, n), fp64(14.3))
        ours, truth = (
            value_and_grads(functools.partial(f, **options), *args) for f in (contrastive_loss, reference)
        )
        # The row below eps has a gradient of 1e12 times that of the others.
        assert_close([ours[2][n // 2]], [truth[2][n // 2]], names=("y below eps",))
        for each in (ours, truth):
            each[2][n // 2] = 0
        assert_close(ours, truth)
        assert ours[1][0].abs().max() == 0 and ours[1][:, 20:].abs().max() == 0


@pytest.mark.parametrize("d", [8, 24])
def test_one_prefix_is_the_loss_of_normalised_vectors(d):
    pairs = pair_kinds(30, 20)["all"]
    args = (*(2 * t for t in embeddings(30, 20, 24)), fp64(14.3))

    def normalised(x, y, scale):
        unit = torch.nn.functional.normalize
        return contrastive_loss(unit(x[:, :d]), unit(y[:, :d]), scale, pairs)

    ours = value_and_grads(lambda *a: contrastive_loss(*a, pairs, dims=(d,)), *args)
    assert_close(ours, value_and_grads(normalised, *args))


@pytest.mark.parametrize("dims", [None, PREFIXES])
@pytest.mark.parametrize("kind", ["negative_offset", "all"])
def test_shards_of_columns_add_up(kind, dims):
    """The parts of the loss from two shards of columns are those from all columns."""
    m, n, cut = 50, 70, 30
    (x, y), scale, grad = embeddings(m, n, 24), fp64(14.3), fp64(0.7)
    pairs = pair_kinds(m, n)[kind]
    listed = pairs.positives(m, n, x.device)
    masks = pair_tiles.PairMasks(listed.rows_K, listed.cols_K, pairs.row_ids, pairs.col_ids, *pairs.known())
    options = {"normalizer": None, "share": 0.5, "normalize_entries": True, "empty": "zero", "dtype": x.dtype}
    rows = coefficients(listed.rows_K, listed.weights_K, pairs.row_weights, m, **options)
    cols = coefficients(listed.cols_K, listed.weights_K, pairs.col_weights, n, **options)
    whole = sides(*rows, *cols, pairs.log_q_cols, pairs.log_q_rows, x.dtype)
    offset = pairs.offset if pairs.indptr is None else None

    shards = []
    for first, last in ((0, cut), (cut, n)):
        of_rows, of_cols = whole
        q = None if of_rows.log_q is None else of_rows.log_q[first:last]
        part = of_rows._replace(log_q=q), of_cols._replace(segment=of_cols.segment[first:last])
        from_here = None if offset is None else offset - first
        shards.append((y[first:last], scale, masks.of_columns(first, last), from_here, part))

    found = [softmax_statistics(x, *shard, dims) for shard in shards]
    (s_one, (row_one, col_one)), (s_two, (row_two, col_two)) = found
    s_PK = torch.where(listed.cols_K < cut, s_one, s_two)
    of_rows = merge_statistics(row_one, row_two)
    of_cols = tuple(torch.cat(each, 1) for each in zip(col_one, col_two))
    loss = softmax_loss(s_PK, (of_rows, of_cols), masks, whole)
    gradients = [
        softmax_gradients(grad, (of_rows, col), x, *shard, (True, True), dims)
        for col, shard in zip((col_one, col_two), shards)
    ]
    (dx_one, dy_one, dscale_one), (dx_two, dy_two, dscale_two) = gradients
    expected = value_and_grads(lambda *a: contrastive_loss(*a, pairs, dims=dims), x, y, scale)
    assert_close([loss, dx_one + dx_two, torch.cat([dy_one, dy_two]), dscale_one + dscale_two], expected)


@pytest.mark.parametrize("scale", SCALES)
def test_error_of_prefixes_is_at_most_twice_that_of_plain_torch(scale, monkeypatch):
    monkeypatch.setattr(pair_tiles, "TILE", (64, 64))
    m, n, dims = 129, 127, (25, 50, 100)
    for dtype in (torch.float32, torch.bfloat16):
        errors = Errors()
        for seed in range(8):
            x, y = embeddings(m, n, 100, dtype=dtype, seed=seed)
            s = torch.tensor(scale)
            pairs = cast(pair_kinds(m, n)["all"], torch.float32)
            exact = cast(pairs, torch.float64)
            errors.add(
                value_and_grads(lambda *a, p=pairs: contrastive_loss(*a, p, dims=dims), x, y, s),
                value_and_grads(lambda *a, p=pairs: reference(*a, p, dims=dims), x, y, s),
                value_and_grads(
                    lambda *a, p=exact: reference(*a, p, dims=dims), x.double(), y.double(), s.double()
                ),
            )
        errors.check(torch.finfo(dtype).eps)


def test_equals_reference_across_tiles_of_the_real_size():
    m, n = 1100, 1030
    x, y = embeddings(m, n, 8)
    pairs = pair_kinds(m, n)["all"]
    assert_close(
        value_and_grads(lambda *a: contrastive_loss(*a, pairs), x, y, fp64(14.3)),
        value_and_grads(lambda *a: reference(*a, pairs), x, y, fp64(14.3)),
    )


def test_equals_open_clip():
    x, y = embeddings(70, 70, 32)
    theirs = value_and_grads(open_clip.loss.ClipLoss(), x, y, fp64(14.3))
    assert_close(value_and_grads(contrastive_loss, x, y, fp64(14.3)), theirs)


# Invariants -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_log_scale_is_the_inner_product(kind):
    x, y = embeddings(129, 65)
    _, dx, dy, dscale = value_and_grads(
        lambda *a: contrastive_loss(*a, pair_kinds(129, 65)[kind]), x, y, fp64(9.0)
    )
    expected = [9.0 * dscale] * 2
    assert_close([(x * dx).sum(), (y * dy).sum()], expected, names=("<x, dx>", "<y, dy>"))


@pytest.mark.usefixtures("tiles")
def test_gradient_rows_sum_to_zero():
    """With y the identity, dL/dx is the gradient of the logits themselves, times the scale."""
    x = embeddings(65, 1, 70)[0]
    _, dx, *_ = value_and_grads(
        lambda *a: contrastive_loss(*a, direction="rows"), x, torch.eye(70).double(), fp64(5.0)
    )
    assert dx.abs().max() > 1e-3
    assert_close([dx.sum(1)], [torch.zeros(65, dtype=torch.float64)], rtol=1e-14)


@pytest.mark.usefixtures("tiles")
def test_swapping_x_and_y():
    x, y = embeddings(65, 129)
    p = pair_kinds(65, 129)["log_q"]
    turned = Pairs(
        log_q_cols=p.log_q_rows,
        log_q_rows=p.log_q_cols,
        row_weights=p.col_weights,
        col_weights=p.row_weights,
    )
    loss, dx, dy, dscale = value_and_grads(lambda *a: contrastive_loss(*a, p), x, y, fp64(14.3))
    other = value_and_grads(lambda *a: contrastive_loss(*a, turned), y, x, fp64(14.3))
    assert_close(other, [loss, dy, dx, dscale])


@pytest.mark.usefixtures("tiles")
def test_permuting_rows_and_columns_permutes_the_gradients():
    x, y = embeddings(66, 130)
    rows, cols = (torch.randperm(k, generator=torch.Generator().manual_seed(3)) for k in (66, 130))
    place = cols.argsort()
    plain = Pairs(indptr=torch.arange(67), indices=torch.arange(66))
    shuffled = Pairs(indptr=torch.arange(67), indices=place[rows])
    loss, dx, dy, dscale = value_and_grads(lambda *a: contrastive_loss(*a, plain), x, y, fp64(14.3))
    other = value_and_grads(lambda *a: contrastive_loss(*a, shuffled), x[rows], y[cols], fp64(14.3))
    assert_close(other, [loss, dx[rows], dy[cols], dscale])


def test_tile_shape_does_not_matter(monkeypatch):
    x, y = embeddings(100, 140)
    pairs = pair_kinds(100, 140)["all"]
    results = []
    for shape in [(1, 140), (7, 13), (64, 32), (100, 1), (1000, 1000)]:
        monkeypatch.setattr(pair_tiles, "TILE", shape)
        results.append(value_and_grads(lambda *a: contrastive_loss(*a, pairs), x, y, fp64(14.3)))
    for other in results[1:]:
        assert_close(other, results[0])


def test_repeatable_bit_for_bit(monkeypatch):
    monkeypatch.setattr(pair_tiles, "TILE", (64, 64))
    x, y = embeddings(200, 190, dtype=torch.float32)
    pairs = cast(pair_kinds(200, 190)["all"], torch.float32)
    for dims in (None, (4, 16)):
        first, second = (
            value_and_grads(lambda *a, d=dims: contrastive_loss(*a, pairs, dims=d), x, y, torch.tensor(50.0))
            for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second))


# Hard inputs ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("sign", [1, -1], ids=["identical", "anti-aligned"])
@pytest.mark.parametrize("scale", SCALES)
def test_identical_and_anti_aligned_embeddings(scale, sign):
    """All rows equal: the softmax is uniform, whatever the scale, and nothing overflows."""
    n = 130
    x = embeddings(1, 1, dtype=torch.float32)[0].expand(n, -1)
    loss, dx, dy, dscale = value_and_grads(contrastive_loss, x, sign * x, torch.tensor(scale))
    # The plain torch error of the logits at this scale: a few roundings of |S| = scale.
    assert abs(loss - torch.log(torch.tensor(float(n)))) <= 4 * 1.2e-7 * max(scale, 5.0)
    for gradient in (dx, dy):
        assert gradient.abs().max() <= 4 * 1.2e-7 * scale * max(scale, 1.0)
    assert abs(dscale) <= 1e-5


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("scale", SCALES)
def test_row_with_all_negatives_masked_has_no_loss(scale):
    m, n = 65, 70
    x, y = embeddings(m, n, dtype=torch.float32)
    others = [c for c in range(n) if c != 3]
    known = csr([others if r == 3 else [] for r in range(m)])
    pairs = Pairs(known_indptr=known[0], known_indices=known[1], row_weights=(torch.arange(m) == 3).float())
    results = value_and_grads(
        lambda *a: contrastive_loss(*a, pairs, direction="rows"), x, y, torch.tensor(scale)
    )
    for value in results:
        assert value.abs().max() == 0


def test_nothing_is_positive():
    x, y = embeddings(4, 5)
    for pairs in (Pairs(offset=9), Pairs(row_weights=torch.zeros(4), col_weights=torch.zeros(5))):
        for value in value_and_grads(lambda *a, p=pairs: contrastive_loss(*a, p), x, y, fp64(2.0)):
            assert value.abs().max() == 0


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dims", [None, (2, 16)])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_inf_propagate_as_in_the_reference(poison, direction, dims):
    x, y = embeddings(70, 70)
    x[5, 2] = poison
    ours, truth = (
        value_and_grads(lambda *a, f=f: f(*a, Pairs(), direction=direction, dims=dims), x, y, fp64(3.0))
        for f in (contrastive_loss, reference)
    )
    assert not ours[0].isfinite()
    for a, e in zip(ours, truth):
        assert torch.equal(a.isfinite(), e.isfinite())


def test_removed_items_get_no_gradient_and_change_nothing():
    """Weight 0 and log_q = +inf are the same as taking the row and the column out."""
    x, y = embeddings(12, 12)
    keep = torch.arange(12) % 3 != 0
    gone = torch.where(keep, 0.0, torch.inf)
    pairs = Pairs(log_q_cols=gone, log_q_rows=gone, row_weights=keep.double(), col_weights=keep.double())
    loss, dx, dy, dscale = value_and_grads(lambda *a: contrastive_loss(*a, pairs), x, y, fp64(5.0))
    assert dx[~keep].abs().max() == 0 and dy[~keep].abs().max() == 0
    small = value_and_grads(contrastive_loss, x[keep], y[keep], fp64(5.0))
    assert_close([loss, dx[keep], dy[keep], dscale], small)


def test_non_contiguous_and_half_inputs():
    x, y = embeddings(40, 40, 32)
    wide = torch.stack([x, x], dim=2).flatten(1)[:, ::2]
    assert not wide.is_contiguous()
    assert_close(
        value_and_grads(contrastive_loss, wide, y.T.contiguous().T, fp64(3.0)),
        value_and_grads(contrastive_loss, x, y, fp64(3.0)),
    )
    for dtype in (torch.float16, torch.bfloat16):
        loss, dx, dy, _ = value_and_grads(contrastive_loss, x.to(dtype), y.to(dtype), torch.tensor(3.0))
        assert (loss.dtype, dx.dtype, dy.dtype) == (torch.float32, dtype, dtype)


def test_only_what_is_asked_for_gets_a_gradient():
    x, y = embeddings(9, 9)
    full = value_and_grads(contrastive_loss, x, y, fp64(3.0), upstream=1.0)
    prefixes = value_and_grads(lambda *a: contrastive_loss(*a, dims=(4, 8)), x, y, fp64(3.0), upstream=1.0)
    for which in range(3):
        inputs = [x, y, fp64(3.0)]
        inputs[which] = inputs[which].clone().requires_grad_()
        (grad,) = torch.autograd.grad(contrastive_loss(*inputs), inputs[which])
        assert_close([grad], [full[1 + which]])
        (grad,) = torch.autograd.grad(contrastive_loss(*inputs, dims=(4, 8)), inputs[which])
        assert_close([grad], [prefixes[1 + which]])
    assert not contrastive_loss(x, y, 3.0).requires_grad


# torch.library, torch.compile, autocast -------------------------------------------------------------------


def _operands(kind, direction, dims):
    """Arguments of the raw op, as the public function calls it."""
    seen = []
    x, y = leaves(*embeddings(6, 7, 8, dtype=torch.float32))
    pairs = cast(pair_kinds(6, 7)[kind], torch.float32)

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.pinclip.contrastive.default:
                seen.append(args)
            return func(*args, **(kwargs or {}))

    with Spy():
        contrastive_loss(x, y, torch.tensor(5.0), pairs, direction=direction, dims=dims)
    arguments = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in seen[0]]
    arguments[:3] = leaves(*arguments[:3])
    return arguments


@pytest.mark.parametrize("dims", [None, (8, 4)])
@pytest.mark.parametrize("kind,direction", [("diagonal", "symmetric"), ("all", "columns"), ("csr", "rows")])
def test_opcheck(kind, direction, dims):
    arguments = _operands(kind, direction, dims)
    torch.library.opcheck(torch.ops.pinclip.contrastive.default, arguments)
    with torch.no_grad():
        loss, *lse = torch.ops.pinclip.contrastive(*arguments)
        arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        for need in [(True, True), (False, True), (True, False), (False, False)]:
            torch.library.opcheck(
                torch.ops.pinclip.contrastive_backward.default,
                (torch.ones_like(loss), *lse, *arguments, *need),
                test_utils=("test_schema", "test_faketensor"),
            )


def test_compiles_as_one_graph():
    x, y = embeddings(20, 30, 16, dtype=torch.float32)
    features = cast(pair_kinds(20, 30)["all"], torch.float32)

    def step(x, y, scale):
        pairs = Pairs(row_ids=torch.arange(20), col_ids=torch.arange(30))  # built inside the graph, too
        both = contrastive_loss(x, y, scale, features, dims=(8, 16)) + contrastive_loss(x, y, scale, pairs)
        return 2 * both

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    args = (x, y, torch.tensor(5.0))
    assert_close(value_and_grads(compiled, *args), value_and_grads(step, *args), rtol=1e-5)


def test_compiles_with_inductor():
    x, y = embeddings(20, 30, 16, dtype=torch.float32)
    args = (x, y, torch.tensor(5.0))
    with torch._inductor.config.patch(compile_threads=1):
        compiled = value_and_grads(torch.compile(contrastive_loss, fullgraph=True), *args)
    assert_close(compiled, value_and_grads(contrastive_loss, *args), rtol=1e-5)


def test_autocast_does_not_lower_the_precision():
    x, y = embeddings(20, 30, 16, dtype=torch.float32)
    plain = value_and_grads(contrastive_loss, x, y, torch.tensor(14.3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = value_and_grads(contrastive_loss, x, y, torch.tensor(14.3))
    assert all(torch.equal(a, b) for a, b in zip(mixed, plain))


_MEMORY = """
import resource, torch
from pinclip.ops.contrastive import contrastive_loss
from pinclip.ops.sigmoid import sigmoid_loss
torch.set_num_threads(1)

def step(n):
    x, y = (torch.nn.functional.normalize(torch.randn(n, 16), dim=1).requires_grad_() for _ in "xy")
    scale, bias = torch.tensor(5.0, requires_grad=True), torch.tensor(-5.0, requires_grad=True)
    (contrastive_loss(x, y, scale) + sigmoid_loss(x, y, scale, bias)).backward()

step(1024)  # loads the libraries and makes the tiles
with open("/proc/self/status") as status:
    data = int(status.read().split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + 48 * 2**20,) * 2)
step(8192)
"""


def test_memory_is_linear():
    """With 48 MB more than after a small step, N = 8192 goes through; one N×N matrix alone is 268 MB."""
    run = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("loss", [contrastive_loss, reference])
def test_row_without_positives_can_be_an_error(loss):
    x = torch.ones(3, 4)
    indptr, indices = csr([[0], [], [2]])
    pairs = Pairs(indptr=indptr, indices=indices)
    assert loss(x, x, 1.0, pairs).isfinite()
    with pytest.raises(ValueError, match="empty_rows='error'"):
        loss(x, x, 1.0, pairs, direction="rows", empty_rows="error")
    excused = Pairs(indptr=indptr, indices=indices, row_weights=torch.tensor([1.0, 0.0, 1.0]))
    assert loss(x, x, 1.0, excused, direction="rows", empty_rows="error").isfinite()
