import pytest
import torch
import torch.nn.functional as F

from pinclip.losses import NeighborLoss

B, D, SCALE, BIAS = 8, 6, 7.0, -2.0
IDS = torch.tensor([0, 1, 2, 1, 3, 4, 5, 0])
# Row 6 has none; row 2's partner is a known neighbor and stays the positive; row 5's lacks its modality.
PARTNER = torch.tensor([1, 4, 3, 0, 7, 6, -1, 2])
KNOWN = [[1, 2], [], [3, 5], [], [0], [1], [2, 3], [4]]
KNOWN_CSR = (
    torch.tensor([0, *map(len, KNOWN)]).cumsum(0),
    torch.tensor([c for each in KNOWN for c in each]),
)
VALID_X = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
VALID_Y = torch.tensor([1, 1, 1, 1, 1, 1, 0, 1], dtype=torch.bool)
LOG_Q = torch.linspace(-3, -1, B)
FEATURES = {"known": KNOWN_CSR, "log_q": LOG_Q, "valid_x": VALID_X, "valid_y": VALID_Y}


def batch():
    generator = torch.Generator().manual_seed(0)
    return [
        F.normalize(torch.randn(B, D, dtype=torch.float64, generator=generator), dim=1).requires_grad_()
        for _ in range(2)
    ]


def by_hand(kind, x, y):
    """Term by term, every feature on."""
    total, rows = 0.0, 0
    for i, p in enumerate(PARTNER.tolist()):
        if p < 0 or not VALID_X[i] or not VALID_Y[p]:
            continue
        rows += 1
        others = [j for j in range(B) if j != p and VALID_Y[j] and IDS[j] != IDS[i] and j not in KNOWN[i]]
        s = SCALE * y @ x[i] - LOG_Q.double() + (BIAS if kind == "sigmoid" else 0.0)
        if kind == "sigmoid":
            total += F.softplus(-s[p]) + F.softplus(s[others]).sum()
        else:
            total += s[[p, *others]].logsumexp(0) - s[p]
    assert rows == 5
    return total / rows


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_by_hand_with_every_feature(kind):
    x, y = batch()
    loss = NeighborLoss(kind)(x, y, SCALE, BIAS, ids=IDS, partner=PARTNER, **FEATURES)
    expected = by_hand(kind, x, y)
    assert abs(loss - expected) < 1e-12
    for a, e in zip(torch.autograd.grad(loss, (x, y)), torch.autograd.grad(expected, (x, y))):
        assert (a - e).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_invalid_rows_may_hold_anything(kind):
    x, y = batch()
    clean = NeighborLoss(kind)(x, y, SCALE, BIAS, ids=IDS, partner=PARTNER, **FEATURES)
    bad_x = torch.where(VALID_X[:, None], x, torch.nan).detach().requires_grad_()
    bad_y = torch.where(VALID_Y[:, None], y, torch.nan).detach().requires_grad_()
    loss = NeighborLoss(kind)(bad_x, bad_y, SCALE, BIAS, ids=IDS, partner=PARTNER, **FEATURES)
    assert torch.equal(loss, clean)
    dx, dy = torch.autograd.grad(loss, (bad_x, bad_y))
    assert dx[~VALID_X].abs().max() == 0 and dy[~VALID_Y].abs().max() == 0
    assert dx[VALID_X & (PARTNER >= 0) & VALID_Y[PARTNER]].abs().min() > 0


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_no_partner_at_all_is_no_loss(kind):
    x, y = batch()
    partner = torch.full((B,), -1)
    loss = NeighborLoss(kind)(x, y, SCALE, BIAS, ids=IDS, partner=partner)
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (x, y)))


def test_same_embedding_on_both_sides():
    """fused–fused: the gradient comes from the rows and from the columns."""
    x, _ = batch()
    loss = NeighborLoss()(x, x, SCALE, ids=IDS, partner=PARTNER, **FEATURES)
    expected = by_hand("softmax", x, x)
    assert abs(loss - expected) < 1e-12
    (a,), (e,) = torch.autograd.grad(loss, x), torch.autograd.grad(expected, x)
    assert (a - e).abs().max() < 1e-12


def test_bad_arguments():
    x, y = batch()
    good = {"ids": IDS, "partner": PARTNER}
    with pytest.raises(ValueError, match="kind='triplet'"):
        NeighborLoss("triplet")
    with pytest.raises(ValueError, match="bias=None"):
        NeighborLoss("sigmoid")(x, y, SCALE, **good)
    with pytest.raises(ValueError, match="partner has row 8, expected -1 … 7"):
        NeighborLoss()(x, y, SCALE, ids=IDS, partner=PARTNER + 1)
    with pytest.raises(ValueError, match="partner has row -2"):
        NeighborLoss()(x, y, SCALE, ids=IDS, partner=PARTNER - 1)
    with pytest.raises(ValueError, match="partner has dtype"):
        NeighborLoss()(x, y, SCALE, ids=IDS, partner=PARTNER.int())
    with pytest.raises(ValueError, match=r"y has shape \(7, 6\)"):
        NeighborLoss()(x, y[1:], SCALE, **good)
    for name in ("ids", "partner", "log_q", "valid_x", "valid_y"):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            NeighborLoss()(x, y, SCALE, **{**good, name: torch.zeros(B + 1)})
    with pytest.raises(ValueError, match="known_indices has column 8"):
        NeighborLoss()(x, y, SCALE, **good, known=(torch.arange(B + 1), torch.full((B,), 8)))
