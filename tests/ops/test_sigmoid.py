import functools

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
from pinclip.ops.pairs import Pairs, coefficients
from pinclip.ops.sigmoid import sigmoid_loss, sigmoid_parts
from pinclip.reference.sigmoid import sigmoid_loss as reference

KINDS = list(pair_kinds(3, 3))
BIAS = -3.0


@pytest.fixture(params=[(64, 64), (1024, 1024)], ids=["small_tiles", "one_tile"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(pair_tiles, "TILE", request.param)


def fp64(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_gradcheck(kind):
    x, y = embeddings(5, 6, 4)
    pairs = pair_kinds(5, 6)[kind]
    dims = (2, 4) if kind == "all" else None

    def loss(x, y, scale, bias):
        return reference(x, y, scale, bias, pairs, dims=dims)

    assert torch.autograd.gradcheck(loss, (*leaves(x, y, fp64(3.0), fp64(-1.0)),))


def test_reference_by_hand():
    """Two rows, three columns, every feature, written out term by term."""
    x, y = embeddings(2, 3, 4)
    q = [0.1, -0.2, 0.3]
    s = (5.0 * x @ y.T - 2.0 - fp64(q)).tolist()
    pairs = Pairs(
        indptr=torch.tensor([0, 2, 3]),
        indices=torch.tensor([0, 2, 1]),
        weights=fp64([1.0, 3.0, 2.0]),
        row_ids=torch.tensor([4, 5]),
        col_ids=torch.tensor([4, 4, 5]),  # masks (0, 1) and (1, 2); (0, 0) is listed, so it stays
        log_q_cols=fp64(q),
        row_weights=fp64([2.0, 0.5]),
    )

    def softplus(v):
        return fp64(v).exp().log1p()

    first = 1.0 * softplus(-s[0][0]) + 3.0 * softplus(-s[0][2])
    second = 2.0 * softplus(-s[1][1]) + softplus(s[1][0])
    expected = (2.0 * first + 0.5 * second) / 2.5
    for loss in (reference, sigmoid_loss):
        assert_close([loss(x, y, 5.0, -2.0, pairs)], [expected])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("tiles")
def test_equals_reference(kind):
    for m, n in SIZES:
        x, y = embeddings(m, n)
        pairs = pair_kinds(m, n)[kind]
        args = (x, y, fp64(14.3), fp64(BIAS))
        assert_close(
            value_and_grads(lambda *a, p=pairs: sigmoid_loss(*a, p), *args),
            value_and_grads(lambda *a, p=pairs: reference(*a, p), *args),
        )


@pytest.mark.parametrize("kind", ["diagonal", "all"])
@pytest.mark.parametrize("scale", SCALES)
def test_error_is_at_most_twice_that_of_plain_torch(scale, kind, monkeypatch):
    monkeypatch.setattr(pair_tiles, "TILE", (64, 64))
    m, n, d = 129, 127, 100
    for dtype in (torch.float32, torch.bfloat16):
        errors = Errors()
        for seed in range(8):
            x, y = embeddings(m, n, d, dtype=dtype, seed=seed)
            s, b = torch.tensor(scale), torch.tensor(BIAS)
            pairs = cast(pair_kinds(m, n)[kind], torch.float32)
            exact = cast(pairs, torch.float64)
            wide = (x.double(), y.double(), s.double(), b.double())
            errors.add(
                value_and_grads(lambda *a, p=pairs: sigmoid_loss(*a, p), x, y, s, b),
                value_and_grads(lambda *a, p=pairs: reference(*a, p), x, y, s, b),
                value_and_grads(lambda *a, p=exact: reference(*a, p), *wide),
            )
        errors.check(torch.finfo(dtype).eps)


def test_normalizer_and_matryoshka():
    """The loss over prefixes is the mean of the separate losses of renormalised prefixes."""
    x, y = embeddings(20, 30, 16)
    pairs = pair_kinds(20, 30)["all"]

    def fused(x, y, s, b):
        return sigmoid_loss(x, y, s, b, pairs, dims=(4, 8, 16), normalizer=3.5)

    def separate(x, y, s, b):
        unit = torch.nn.functional.normalize
        parts = [(unit(x[:, :d]), unit(y[:, :d])) for d in (4, 8, 16)]
        return sum(reference(*part, s, b, pairs, normalizer=3.5) for part in parts) / 3

    args = (2 * x, 3 * y, fp64(7.0), fp64(BIAS))
    assert_close(value_and_grads(fused, *args), value_and_grads(separate, *args))
    assert_close([reference(*args, pairs, dims=(4, 8, 16), normalizer=3.5)], [fused(*args)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("tiles")
def test_prefixes_equal_reference(kind):
    for m, n in [(1, 3), (65, 63), (64, 129), (129, 127)]:
        options = {"pairs": pair_kinds(m, n)[kind], "dims": PREFIXES}
        args = (*uneven_embeddings(m, n), fp64(14.3), fp64(BIAS))
        ours, truth = (
            value_and_grads(functools.partial(f, **options), *args) for f in (sigmoid_loss, reference)
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
    args = (*(2 * t for t in embeddings(30, 20, 24)), fp64(14.3), fp64(BIAS))

    def normalised(x, y, *rest):
        unit = torch.nn.functional.normalize
        return sigmoid_loss(unit(x[:, :d]), unit(y[:, :d]), *rest, pairs)

    ours = value_and_grads(lambda *a: sigmoid_loss(*a, pairs, dims=(d,)), *args)
    assert_close(ours, value_and_grads(normalised, *args))


@pytest.mark.parametrize("dims", [None, PREFIXES])
@pytest.mark.parametrize("kind", ["negative_offset", "all"])
def test_shards_of_columns_add_up(kind, dims):
    """The parts of the loss from two shards of columns are those from all columns."""
    m, n, cut = 50, 70, 30
    (x, y), scalars = embeddings(m, n, 24), (fp64(14.3), fp64(BIAS))
    pairs = pair_kinds(m, n)[kind]
    listed = pairs.positives(m, n, x.device)
    masks = pair_tiles.PairMasks(listed.rows_K, listed.cols_K, pairs.row_ids, pairs.col_ids, *pairs.known())
    options = {
        "normalizer": None,
        "share": 1.0,
        "normalize_entries": False,
        "empty": "zero",
        "dtype": x.dtype,
    }
    entry_K, segment_M = coefficients(listed.rows_K, listed.weights_K, pairs.row_weights, m, **options)
    found = []
    for first, last in ((0, cut), (cut, n)):
        here = masks.of_columns(first, last)
        entries = torch.where(here.pos_rows < 0, 0.0, entry_K)
        offset = pairs.offset - first if pairs.indptr is None else None
        log_q = None if pairs.log_q_cols is None else pairs.log_q_cols[first:last]
        problem = (x, y[first:last], *scalars, here, offset, entries, segment_M, log_q)
        found.append(sigmoid_parts(*problem, (True, True), dims))
    loss, dx, dy, *rest = (torch.cat(each) if i == 2 else sum(each) for i, each in enumerate(zip(*found)))
    expected = value_and_grads(lambda *a: sigmoid_loss(*a, pairs, dims=dims), x, y, *scalars, upstream=1.0)
    assert_close([loss, dx, dy, *rest], expected)


@pytest.mark.parametrize("scale", SCALES)
def test_error_of_prefixes_is_at_most_twice_that_of_plain_torch(scale, monkeypatch):
    monkeypatch.setattr(pair_tiles, "TILE", (64, 64))
    m, n, dims = 129, 127, (25, 50, 100)
    for dtype in (torch.float32, torch.bfloat16):
        errors = Errors()
        for seed in range(8):
            args = (*embeddings(m, n, 100, dtype=dtype, seed=seed), torch.tensor(scale), torch.tensor(BIAS))
            pairs = cast(pair_kinds(m, n)["all"], torch.float32)
            exact = cast(pairs, torch.float64)
            wide = [a.double() for a in args]
            errors.add(
                value_and_grads(lambda *a, p=pairs: sigmoid_loss(*a, p, dims=dims), *args),
                value_and_grads(lambda *a, p=pairs: reference(*a, p, dims=dims), *args),
                value_and_grads(lambda *a, p=exact: reference(*a, p, dims=dims), *wide),
            )
        errors.check(torch.finfo(dtype).eps)


def test_equals_open_clip():
    x, y = embeddings(70, 70, 32)
    args = (x, y, fp64(14.3), fp64(-10.0))
    theirs = value_and_grads(open_clip.loss.SigLipLoss(), *args)
    assert_close(value_and_grads(sigmoid_loss, *args), theirs)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_log_scale_is_the_inner_product(kind):
    x, y = embeddings(129, 65)
    pairs = pair_kinds(129, 65)[kind]
    _, dx, dy, dscale, _ = value_and_grads(lambda *a: sigmoid_loss(*a, pairs), x, y, fp64(9.0), fp64(BIAS))
    expected = [9.0 * dscale] * 2
    assert_close([(x * dx).sum(), (y * dy).sum()], expected, names=("<x, dx>", "<y, dy>"))


@pytest.mark.usefixtures("tiles")
def test_swapping_x_and_y():
    """Without row weights the sigmoid loss knows no direction."""
    x, y = embeddings(129, 129)
    rest = (fp64(14.3), fp64(BIAS))
    loss, dx, dy, dscale, dbias = value_and_grads(sigmoid_loss, x, y, *rest)
    other = value_and_grads(sigmoid_loss, y, x, *rest)
    assert_close(other, [loss, dy, dx, dscale, dbias])


@pytest.mark.usefixtures("tiles")
def test_permuting_rows_and_columns_permutes_the_gradients():
    x, y = embeddings(66, 130)
    rows, cols = (torch.randperm(k, generator=torch.Generator().manual_seed(3)) for k in (66, 130))
    place = cols.argsort()
    plain = Pairs(indptr=torch.arange(67), indices=torch.arange(66))
    shuffled = Pairs(indptr=torch.arange(67), indices=place[rows])
    rest = (fp64(14.3), fp64(BIAS))
    loss, dx, dy, *scalars = value_and_grads(lambda *a: sigmoid_loss(*a, plain), x, y, *rest)
    other = value_and_grads(lambda *a: sigmoid_loss(*a, shuffled), x[rows], y[cols], *rest)
    assert_close(other, [loss, dx[rows], dy[cols], *scalars])


def test_tile_shape_does_not_matter(monkeypatch):
    x, y = embeddings(100, 140)
    pairs = pair_kinds(100, 140)["all"]
    results = []
    for shape in [(1, 140), (7, 13), (64, 32), (100, 1), (1000, 1000)]:
        monkeypatch.setattr(pair_tiles, "TILE", shape)
        results.append(value_and_grads(lambda *a: sigmoid_loss(*a, pairs), x, y, fp64(14.3), fp64(BIAS)))
    for other in results[1:]:
        assert_close(other, results[0])


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("sign", [1, -1], ids=["identical", "anti-aligned"])
@pytest.mark.parametrize("scale", [*SCALES, 23.5])  # the last: just above the default threshold of softplus
def test_identical_and_anti_aligned_embeddings(scale, sign):
    """All logits equal: the loss is n-1 times softplus of it, and one softplus of its opposite."""
    n = 130
    x = embeddings(1, 1)[0].expand(n, -1)
    loss, dx, dy, dscale, dbias = value_and_grads(sigmoid_loss, x, sign * x, fp64(scale), fp64(BIAS))
    s = fp64(sign * scale + BIAS)
    softplus, slope = torch.nn.functional.softplus, torch.sigmoid(s)
    expected = (n - 1) * softplus(s, threshold=700) + softplus(-s, threshold=700)
    dlogit = 0.7 * ((n - 1) * slope - torch.sigmoid(-s))
    assert_close(
        [loss, dx, dy, dscale, dbias],
        [expected, scale / n * dlogit * sign * x, scale / n * dlogit * x, sign * dlogit, dlogit],
    )


@pytest.mark.usefixtures("tiles")
def test_row_with_all_negatives_masked_keeps_its_positive():
    m, n = 65, 70
    x, y = embeddings(m, n)
    known = csr([[c for c in range(n) if c != 3] if r == 3 else [] for r in range(m)])
    pairs = Pairs(known_indptr=known[0], known_indices=known[1], row_weights=(torch.arange(m) == 3).double())
    loss, dx, *_ = value_and_grads(
        lambda *a: sigmoid_loss(*a, pairs), x, y, fp64(5.0), fp64(BIAS), upstream=1.0
    )
    s = 5.0 * x[3] @ y[3] + BIAS
    expected = torch.zeros_like(x)
    expected[3] = -torch.sigmoid(-s) * 5.0 * y[3]
    assert_close([loss, dx], [torch.nn.functional.softplus(-s), expected])


def test_nothing_is_positive():
    x, y = embeddings(4, 5)
    for pairs in (Pairs(offset=9), Pairs(row_weights=torch.zeros(4))):
        args = (x, y, fp64(2.0), fp64(1.0))
        for value in value_and_grads(lambda *a, p=pairs: sigmoid_loss(*a, p), *args):
            assert value.abs().max() == 0


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dims", [None, (2, 16)])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_inf_propagate_as_in_the_reference(poison, dims):
    x, y = embeddings(70, 70)
    x[5, 2] = poison
    args = (x, y, fp64(3.0), fp64(BIAS))
    ours, truth = (
        value_and_grads(lambda *a, f=f: f(*a, Pairs(), dims=dims), *args) for f in (sigmoid_loss, reference)
    )
    assert not ours[0].isfinite()
    for a, e in zip(ours, truth):
        assert torch.equal(a.isfinite(), e.isfinite())


def test_removed_items_get_no_gradient_and_change_nothing():
    """Weight 0 and log_q = +inf are the same as taking the row and the column out."""
    x, y = embeddings(12, 12)
    keep = torch.arange(12) % 3 != 0
    pairs = Pairs(log_q_cols=torch.where(keep, 0.0, torch.inf), row_weights=keep.double())
    rest = (fp64(5.0), fp64(BIAS))
    loss, dx, dy, *scalars = value_and_grads(lambda *a: sigmoid_loss(*a, pairs), x, y, *rest)
    assert dx[~keep].abs().max() == 0 and dy[~keep].abs().max() == 0
    small = value_and_grads(sigmoid_loss, x[keep], y[keep], *rest)
    assert_close([loss, dx[keep], dy[keep], *scalars], small)


def test_only_what_is_asked_for_gets_a_gradient():
    x, y = embeddings(9, 9)
    args = x, y, fp64(3.0), fp64(BIAS)
    full = value_and_grads(sigmoid_loss, *args, upstream=1.0)
    prefixes = value_and_grads(lambda *a: sigmoid_loss(*a, dims=(4, 8)), *args, upstream=1.0)
    for which in range(4):
        inputs = [x, y, fp64(3.0), fp64(BIAS)]
        inputs[which] = inputs[which].clone().requires_grad_()
        (grad,) = torch.autograd.grad(sigmoid_loss(*inputs), inputs[which])
        assert_close([grad], [full[1 + which]])
        (grad,) = torch.autograd.grad(sigmoid_loss(*inputs, dims=(4, 8)), inputs[which])
        assert_close([grad], [prefixes[1 + which]])
    assert not sigmoid_loss(x, y, 3.0, BIAS).requires_grad
    with torch.no_grad():
        assert_close([sigmoid_loss(*leaves(x, y, fp64(3.0)), BIAS)], full)


def _operands(kind, dims):
    """Arguments of the raw op, as the public function calls it."""
    seen = []
    x, y = leaves(*embeddings(6, 7, 8, dtype=torch.float32))
    pairs = cast(pair_kinds(6, 7)[kind], torch.float32)

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.pinclip.sigmoid.default:
                seen.append(args)
            return func(*args, **(kwargs or {}))

    with Spy():
        sigmoid_loss(x, y, torch.tensor(5.0), torch.tensor(BIAS), pairs, dims=dims)
    arguments = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in seen[0]]
    arguments[:4] = leaves(*arguments[:4])
    return arguments


@pytest.mark.parametrize("dims", [None, (8, 4)])
@pytest.mark.parametrize("kind", ["diagonal", "all"])
def test_opcheck(kind, dims):
    arguments = _operands(kind, dims)
    torch.library.opcheck(torch.ops.pinclip.sigmoid.default, arguments)
    with torch.no_grad():
        plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments[:-3]]
        for need in [(True, True, False), (True, False, True), (True, False, False), (False, False, False)]:
            checks = ("test_schema", "test_faketensor")
            torch.library.opcheck(torch.ops.pinclip.sigmoid.default, (*plain, *need), test_utils=checks)
            _, *grads = torch.ops.pinclip.sigmoid(*plain, *need)
            operands = (torch.tensor(2.0), *grads)
            torch.library.opcheck(torch.ops.pinclip.sigmoid_backward.default, operands, test_utils=checks)


def test_compiles_as_one_graph():
    x, y = embeddings(20, 30, 16, dtype=torch.float32)
    features = cast(pair_kinds(20, 30)["all"], torch.float32)

    def step(x, y, scale, bias):
        pairs = Pairs(row_ids=torch.arange(20), col_ids=torch.arange(30))  # built inside the graph, too
        first = sigmoid_loss(x, y, scale, bias, features, dims=(8, 16))
        return 2 * (first + sigmoid_loss(x, y, scale, bias, pairs))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    args = (x, y, torch.tensor(5.0), torch.tensor(BIAS))
    assert_close(value_and_grads(compiled, *args), value_and_grads(step, *args), rtol=1e-5)


def test_autocast_does_not_lower_the_precision():
    x, y = embeddings(20, 30, 16, dtype=torch.float32)
    args = (x, y, torch.tensor(14.3), torch.tensor(BIAS))
    plain = value_and_grads(sigmoid_loss, *args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = value_and_grads(sigmoid_loss, *args)
    assert all(torch.equal(a, b) for a, b in zip(mixed, plain))


X = torch.ones(3, 4)
BAD_ARGUMENTS = {
    "x has D=4 but y has D=5": {"y": torch.ones(3, 5)},
    r"y has shape \(0, 4\)": {"y": torch.ones(0, 4)},
    "scale=-1.0 is not positive": {"scale": -1.0},
    r"bias has shape \(1,\)": {"bias": torch.ones(1)},
    "bias is on meta": {"bias": torch.ones((), device="meta")},
    r"dims=\(0,\)": {"dims": (0,)},
    "col_ids has length 2, expected 3": {"pairs": Pairs(row_ids=torch.arange(3), col_ids=torch.arange(2))},
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments(message):
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(**{"x": X, "y": X, "scale": 1.0, "bias": 0.0, **BAD_ARGUMENTS[message]})


@pytest.mark.parametrize("loss", [sigmoid_loss, reference])
def test_row_without_positives_can_be_an_error(loss):
    pairs = Pairs(indptr=torch.tensor([0, 1, 1, 2]), indices=torch.tensor([0, 2]))
    assert loss(X, X, 1.0, 0.0, pairs).isfinite()
    with pytest.raises(ValueError, match="empty_rows='error'"):
        loss(X, X, 1.0, 0.0, pairs, empty_rows="error")
