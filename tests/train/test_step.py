"""k micro-batches are one large batch: same loss, same gradient of every parameter."""

import copy
import itertools

import pytest
import torch

from pinclip.data.batches import PinBatch
from pinclip.train.engine import learning_rate_factor, parameter_groups
from pinclip.train.objective import Objective, Trainee
from pinclip.train.run import build_model, prepare
from pinclip.train.step import forward_backward


class PlainEngine:
    """What `Engine` promises, on plain autograd in fp64: `backward` adds up, nothing moves."""

    def __init__(self, module):
        self.module = module

    def forward(self, batch):
        return self.module(batch)

    def backward(self, loss):
        loss.backward()

    def end_micro_batch(self):
        pass


def setup(tiny, **changes):
    config = tiny(**changes)
    run = prepare(config, resume=False)
    trainee = Trainee(build_model(config, run.tokenizer), config.objective, "fp32").double()
    return config, run, trainee, Objective(config.objective, config.model.dims)


def gradients(trainee, objective, batch, micro_batches):
    trainee = copy.deepcopy(trainee)
    loss, parts = forward_backward(PlainEngine(trainee), objective, batch, micro_batches)
    return loss, parts, {name: p.grad for name, p in trainee.named_parameters()}


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_micro_batches_equal_the_large_batch(tiny, kind, micro_batches):
    changes = {
        "objective.image_text": {"kind": kind},
        "objective.neighbor": {"kind": kind},
        "model.dims": [8, 16],
    }
    _, run, trainee, objective = setup(tiny, **changes)
    batch = run.batches[0]
    want_loss, want_parts, want = gradients(trainee, objective, batch, 1)
    loss, parts, got = gradients(trainee, objective, batch, micro_batches)
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    assert parts.keys() == want_parts.keys() and len(parts) == 6
    for name, gradient in want.items():
        assert gradient is not None, name
        # Pixels and losses are fp32 by contract, so fp64 weights agree to fp32's rounding.
        scale = max(float(gradient.abs().max()), 1e-6)
        assert float((got[name] - gradient).abs().max()) <= 2e-5 * scale, name


def test_ordinary_accumulation_would_not_be_equal(tiny):
    """The test above can fail: averaging the losses of the halves gives another gradient."""
    _, run, trainee, objective = setup(tiny)
    batch = run.batches[0]
    _, _, want = gradients(trainee, objective, batch, 1)
    naive = copy.deepcopy(trainee)
    for index in range(2):
        half = batch.micro(index, 2)
        half.partner = torch.arange(len(half)) ^ 1
        loss, _ = objective(*naive(half), half)
        (loss / 2).backward()
    name = "model.text_tower.head.weight"
    difference = (dict(naive.named_parameters())[name].grad - want[name]).abs().max()
    assert difference > 0.05 * want[name].abs().max()


def test_micro_parts_cover_a_batch_with_missing_modalities(tiny):
    _, run, _, _ = setup(tiny)
    batch: PinBatch = run.batches[0]
    keep_image, keep_text = torch.arange(0, 16, 2), torch.arange(0, 16, 3)
    batch.images, batch.image_rows = batch.images[keep_image], batch.image_rows[keep_image]
    batch.tokens, batch.text_rows = batch.tokens[keep_text], batch.text_rows[keep_text]
    batch.token_lengths = batch.token_lengths[keep_text]
    micros = [batch.micro(i, 4) for i in range(4)]
    assert torch.equal(torch.cat([m.images for m in micros]), batch.images)
    assert torch.equal(torch.cat([m.image_rows + 4 * i for i, m in enumerate(micros)]), batch.image_rows)
    assert torch.equal(torch.cat([m.text_rows + 4 * i for i, m in enumerate(micros)]), batch.text_rows)
    assert torch.equal(torch.cat([m.tokens for m in micros]), batch.tokens)


def test_weight_decay_spares_norms_biases_and_scales(tiny):
    _, _, trainee, _ = setup(tiny)
    groups = parameter_groups(trainee, 0.1)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    names = {id(p): name for name, p in trainee.named_parameters()}
    decayed = {names[id(p)] for p in groups[0]["params"]}
    assert sum(len(g["params"]) for g in groups) == len(names)
    assert "model.image_tower.encoder.layers.0.mlp.fc1.weight" in decayed
    for part in ("bias", "norm", "position", "log_scale", "probe", "gate", "fusion_tokens"):
        assert not [name for name in decayed if part in name], part


def test_schedule():
    from pinclip.train.config import OptimConfig

    optim = OptimConfig(warmup_steps=4, final_lr_ratio=0.1)
    factors = [learning_rate_factor(step, 20, optim) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[12] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[20] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[4:]))
