import pytest
import torch
import torch.nn.functional as F

from pinclip.losses import ImageTextLoss
from pinclip.ops.contrastive import contrastive_loss
from pinclip.ops.sigmoid import sigmoid_loss

B, D, SCALE, BIAS = 9, 6, 7.0, -2.0


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        F.normalize(torch.randn(B, D, dtype=torch.float64, generator=generator), dim=1).requires_grad_()
        for _ in range(2)
    ]


def by_hand(kind, image, text, ids, log_q):
    """Term by term: pin i's own pair is positive, pins of another id are negatives."""
    s = SCALE * image @ text.T + (BIAS if kind == "sigmoid" else 0.0)
    total = 0.0
    for i in range(len(image)):
        others = [j for j in range(len(image)) if ids[j] != ids[i]]
        if kind == "sigmoid":
            total += F.softplus(-(s[i, i] - log_q[i]))
            total += sum(F.softplus(s[i, j] - log_q[j]) for j in others)
        else:
            row = torch.stack([s[i, j] - log_q[j] for j in [i, *others]])
            column = torch.stack([s[j, i] - log_q[j] for j in [i, *others]])
            total += (row.logsumexp(0) - row[0] + column.logsumexp(0) - column[0]) / 2
    return total / len(image)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_by_hand_with_every_feature(kind):
    image, text = batch()
    ids = torch.tensor([0, 1, 2, 1, 3, 4, 5, 0, 6])
    log_q = torch.linspace(-3, -1, B)
    valid = torch.tensor([1, 1, 1, 1, 0, 1, 0, 1, 1], dtype=torch.bool)
    loss = ImageTextLoss(kind)(image, text, SCALE, BIAS, ids=ids, valid=valid, log_q=log_q)
    expected = by_hand(kind, image[valid], text[valid], ids[valid], log_q[valid].double())
    assert abs(loss - expected) < 1e-12
    for a, e in zip(torch.autograd.grad(loss, (image, text)), torch.autograd.grad(expected, (image, text))):
        assert (a - e).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_invalid_rows_may_hold_anything(kind):
    image, text = batch()
    valid = torch.arange(B) % 2 == 0
    clean = ImageTextLoss(kind)(image, text, SCALE, BIAS, valid=valid)
    poisoned = [torch.where(valid[:, None], t, torch.nan).detach().requires_grad_() for t in (image, text)]
    loss = ImageTextLoss(kind)(*poisoned, SCALE, BIAS, valid=valid)
    assert torch.equal(loss, clean)
    for gradient in torch.autograd.grad(loss, poisoned):
        assert gradient[~valid].abs().max() == 0 and gradient[valid].abs().max() > 0


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_nothing_valid_is_no_loss(kind):
    image, text = batch()
    loss = ImageTextLoss(kind)(image, text, SCALE, BIAS, valid=torch.zeros(B, dtype=torch.bool))
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (image, text)))


def test_is_the_op_on_plain_batches():
    image, text = batch()
    dims = (2, 6)
    assert torch.equal(
        ImageTextLoss(dims=dims)(image, text, SCALE), contrastive_loss(image, text, SCALE, dims=dims)
    )
    assert torch.equal(
        ImageTextLoss("sigmoid", dims)(image, text, SCALE, BIAS),
        sigmoid_loss(image, text, SCALE, BIAS, dims=dims),
    )


def test_bad_arguments():
    image, text = batch()
    with pytest.raises(ValueError, match="kind='triplet'"):
        ImageTextLoss("triplet")
    with pytest.raises(ValueError, match="bias=None"):
        ImageTextLoss("sigmoid")(image, text, SCALE)
    with pytest.raises(ValueError, match=r"text has shape \(8, 6\)"):
        ImageTextLoss()(image, text[1:], SCALE)
    for name in ("ids", "valid", "log_q"):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            ImageTextLoss()(image, text, SCALE, **{name: torch.zeros(B + 1)})
