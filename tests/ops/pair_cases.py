"""Problems and comparisons shared by the tests of the two pair losses."""

import torch
import torch.nn.functional as F

from pinclip.ops.pairs import Pairs

# 1 and 2: degenerate softmax; 63/64/65 and 127/129: on and around the tile edge of `small_tiles`.
SIZES = [(1, 1), (1, 65), (2, 2), (63, 64), (65, 63), (64, 129), (129, 127)]
SCALES = [1e-3, 1.0, 14.3, 100.0, 1e4]


def embeddings(m, n, d=16, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (F.normalize(torch.randn(k, d, dtype=torch.float64, generator=generator), dim=1) for k in (m, n))
    return x.to(dtype), y.to(dtype)


# Matryoshka prefixes of uneven_embeddings: not in order, one twice, none of all 24 features.
PREFIXES = (8, 20, 16, 8)


def uneven_embeddings(m, n, d=24, *, dtype=torch.float64, seed=0):
    """Rows of all lengths; the first of x is zero, of the last of y the first third. In fp64 the middle row
    of y is shorter than the eps of the norm."""
    x, y = embeddings(m, n, d, seed=seed)
    x, y = (t * torch.linspace(0.3, 3, len(t), dtype=t.dtype)[:, None] for t in (x, y))
    x[0], y[-1, : d // 3] = 0, 0
    if dtype == torch.float64:
        y[n // 2] *= 1e-14
    return x.to(dtype), y.to(dtype)


def csr(lists):
    """CSR of a list of column lists."""
    indptr = torch.tensor([0, *(len(each) for each in lists)]).cumsum(0)
    return indptr, torch.tensor([c for each in lists for c in sorted(each)], dtype=torch.int64)


def random_csr(m, n, most, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, min(most, n) + 1, (m,), generator=generator).tolist()
    return csr([torch.randperm(n, generator=generator)[:k].tolist() for k in counts])


def pair_kinds(m, n, dtype=torch.float64):
    """Every feature of `Pairs`, alone and all together."""
    g = torch.Generator().manual_seed(7)
    indptr, indices = random_csr(m, n, 4, seed=1)
    known_indptr, known_indices = random_csr(m, n, 5, seed=2)
    ids = {
        "row_ids": torch.randint(0, 9, (m,), generator=g),
        "col_ids": torch.randint(0, 9, (n,), generator=g),
    }
    known = {"known_indptr": known_indptr, "known_indices": known_indices}
    listed = {"indptr": indptr, "indices": indices}
    weights = torch.rand(len(indices), generator=g, dtype=dtype)
    weights[::5] = 0
    removed = torch.randn(n, generator=g, dtype=dtype)
    removed[n // 2] = torch.inf
    log_q = {"log_q_cols": removed, "log_q_rows": torch.randn(m, generator=g, dtype=dtype)}
    some_rows = torch.rand(m, generator=g, dtype=dtype)
    some_rows[m // 3] = 0
    # A positive in the removed column has infinite loss, so its row and that column are dropped.
    some_rows[m - 1 if m <= n // 2 else n // 2] = 0
    cols = torch.rand(n, generator=g, dtype=dtype)
    cols[n // 2] = 0
    row_weights = {"row_weights": some_rows, "col_weights": cols}
    weights_off = weights.clone()
    weights_off[indices == n // 2] = 0
    return {
        "diagonal": Pairs(),
        "offset": Pairs(offset=n // 3),
        "negative_offset": Pairs(offset=-(m // 2)),
        "csr": Pairs(**listed),
        "weighted_csr": Pairs(**listed, weights=weights),
        "ids": Pairs(**ids),
        "known": Pairs(**known),
        "log_q": Pairs(**log_q, **row_weights),
        "row_weights": Pairs(**row_weights),
        "all": Pairs(**listed, weights=weights_off, **ids, **known, **log_q, **row_weights),
    }


def cast(pairs, dtype):
    """`pairs` with its floats in `dtype`."""
    fields = {name: getattr(pairs, name) for name in pairs.__dataclass_fields__}
    return Pairs(
        **{
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in fields.items()
        }
    )


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def value_and_grads(loss_of, *tensors, upstream=0.7):
    """[loss, gradients of every tensor], with a gradient of the loss that is not 1."""
    inputs = leaves(*tensors)
    loss = loss_of(*inputs)
    grads = torch.autograd.grad(loss * upstream, inputs, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads))]


def assert_close(actual, expected, rtol=1e-11, names=("loss", "x", "y", "scale", "bias")):
    for name, a, e in zip(names, actual, expected, strict=False):
        bound = rtol * (1 + e.abs().max())
        assert a.shape == e.shape, f"{name}: {tuple(a.shape)} instead of {tuple(e.shape)}"
        assert (a - e).abs().max() <= bound, f"{name}: {(a - e).abs().max():.3g} > {bound:.3g}"


class Errors:
    """Root mean square over draws of the greatest error, against fp64, of ours and of plain torch."""

    def __init__(self):
        self.ours, self.plain, self.size = [], [], []

    def add(self, ours, plain, truth):
        def worst(got):
            return [(g.double() - t).abs().max().item() for g, t in zip(got, truth)]

        self.ours.append(worst(ours))
        self.plain.append(worst(plain))
        self.size.append([t.abs().max().item() for t in truth])

    def check(self, eps):
        def rms(values):
            return torch.tensor(values, dtype=torch.float64).pow(2).mean(0).sqrt().tolist()

        names = ("loss", "x", "y", "scale", "bias")
        for name, ours, plain, size in zip(names, rms(self.ours), rms(self.plain), rms(self.size)):
            # eps * size: one rounding of the result, which a lucky plain error may fall below.
            assert ours <= 2 * plain + eps * size, f"{name}: {ours:.3g} against plain torch's {plain:.3g}"
