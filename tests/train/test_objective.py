"""The objective is the weighted sum it says it is, and every part pulls where it should."""

import pytest
import torch

from pinclip.models import Embeddings
from pinclip.ops import Pairs
from pinclip.reference.contrastive import contrastive_loss
from pinclip.train.objective import Objective, Trainee
from pinclip.train.run import build_model, prepare


def setup(tiny, **changes):
    config = tiny(**changes)
    run = prepare(config, resume=False)
    trainee = Trainee(build_model(config, run.tokenizer), config.objective, "fp32")
    return config, trainee, Objective(config.objective, config.model.dims), run.batches[0]


def test_total_is_the_weighted_sum_of_its_parts(tiny):
    weights = {
        "image_text": 2.0,
        "own_image": 0.15,
        "own_text": 0.15,
        "fused_fused": 0.7,
        "image_fused": 0.4,
        "text_fused": 0.1,
    }
    changes = {
        "objective.image_text_weight": 2.0,
        "objective.own_fused_weight": 0.3,
        "objective.fused_fused_weight": 0.7,
        "objective.image_fused_weight": 0.4,
        "objective.text_fused_weight": 0.1,
    }
    _, trainee, objective, batch = setup(tiny, **changes)
    total, parts = objective(*trainee(batch), batch)
    assert parts.keys() == weights.keys()
    assert float(total.detach()) == pytest.approx(
        sum(weights[name] * float(part) for name, part in parts.items()), rel=1e-6
    )


def test_terms_of_weight_zero_are_not_computed(tiny):
    changes = {f"objective.{kind}_fused_weight": 0.0 for kind in ("fused", "image", "text", "own")}
    _, trainee, objective, batch = setup(tiny, **changes)
    _, parts = objective(*trainee(batch), batch)
    assert parts.keys() == {"image_text"}
    assert trainee.temperatures.keys() == {"image_text"}
    assert (batch.partner == -1).all()


def test_image_text_part_is_the_plain_contrastive_loss(tiny):
    """Against the reference, on a batch whose pins all differ and with logQ off."""
    changes = {"objective.log_q": False}
    changes |= {f"objective.{kind}_fused_weight": 0.0 for kind in ("fused", "image", "text", "own")}
    _, trainee, objective, batch = setup(tiny, **changes)
    embeddings, temperatures = trainee(batch)
    assert len(batch.pins.unique()) == len(batch)
    _, parts = objective(embeddings, temperatures, batch)
    want = contrastive_loss(embeddings.image, embeddings.text, temperatures["image_text"][0], Pairs())
    torch.testing.assert_close(parts["image_text"], want.detach(), rtol=1e-5, atol=0)


def test_a_lacking_modality_gets_no_gradient(tiny):
    _, trainee, objective, batch = setup(tiny)
    embeddings, temperatures = trainee(batch)
    leaves = Embeddings(*(tensor.detach().requires_grad_() for tensor in embeddings))
    lacking = torch.tensor([0, 5])
    batch.text_rows = torch.tensor([row for row in batch.text_rows.tolist() if row not in lacking])
    loss, _ = objective(leaves, temperatures, batch)
    loss.backward()
    assert (leaves.text.grad[lacking] == 0).all()
    assert (leaves.text.grad.abs().sum(1) > 0).sum() == len(batch.text_rows)
    assert (leaves.fused.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("mask_known", [True, False])
def test_known_neighbors_are_no_negatives(tiny, mask_known):
    """Moving a known neighbor's fused vector changes a row's loss only when it counts as a negative."""
    changes = {
        "objective.mask_known": mask_known,
        "objective.image_text_weight": 0.0,
        "objective.own_fused_weight": 0.0,
        "objective.image_fused_weight": 1.0,
        "objective.text_fused_weight": 0.0,
        "objective.fused_fused_weight": 0.0,
        "train.batch_size": 32,
    }
    _, trainee, objective, batch = setup(tiny, **changes)
    row, column = next(
        (row, column)
        for row in range(len(batch))
        for column in batch.known_indices[batch.known_indptr[row] : batch.known_indptr[row + 1]].tolist()
        if batch.partner[row] >= 0 and batch.pins[column] != batch.pins[batch.partner[row]]
    )
    batch.partner = torch.where(torch.arange(len(batch)) == row, batch.partner, -1)  # this row's loss alone
    embeddings, temperatures = trainee(batch)
    fused = embeddings.fused.detach().requires_grad_()
    loss, _ = objective(embeddings._replace(fused=fused), temperatures, batch)
    loss.backward()
    assert bool((fused.grad[column] == 0).all()) == mask_known


def test_bf16_is_autocast_over_fp32_parameters(tiny):
    config, _, objective, batch = setup(tiny)
    run = prepare(config, resume=False)
    trainee = Trainee(build_model(config, run.tokenizer), config.objective, "bf16")
    embeddings, temperatures = trainee(batch)
    assert {p.dtype for p in trainee.parameters()} == {torch.float32}
    assert all(tensor.dtype == torch.float32 for tensor in embeddings)
    loss, _ = objective(embeddings, temperatures, batch)
    loss.backward()
    plain = Trainee(build_model(config, run.tokenizer), config.objective, "fp32")
    want, _ = objective(*plain(batch), batch)
    got, fp32 = float(loss.detach()), float(want.detach())
    assert got == pytest.approx(fp32, rel=0.02) and got != fp32


def test_embeddings_in_half_precision_give_nearly_the_same_loss_and_gradients(tiny):
    config, trainee, objective, batch = setup(tiny)
    half = Objective(config.objective, config.model.dims, torch.bfloat16)
    gradients = []
    for each in (objective, half):
        embeddings, temperatures = trainee(batch)
        total, _ = each(embeddings, temperatures, batch)
        assert total.dtype == torch.float32
        gradients.append((total, *torch.autograd.grad(total, (embeddings.image, embeddings.fused))))
    for exact, rounded in zip(*gradients):
        assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
        assert (rounded - exact).norm() <= 0.02 * exact.norm()
