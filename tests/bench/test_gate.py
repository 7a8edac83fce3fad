"""The gate fails what is wrong, in whichever way, and passes what is right."""

import planted
import pytest
import torch

from bench import gate, registry


def verdict(name, shape=planted.SHAPE):
    arm = next(arm for arm in planted.ARMS if arm.name == name)
    return planted.OP.prepare(shape, arm, "cpu").verdict


def test_a_right_arm_passes_with_its_errors():
    passed = verdict("eager")
    assert passed.passed
    assert {"result", "dx", "dy", "dscale"} <= passed.errors.keys()
    assert 0 <= passed.error < 1e-5


@pytest.mark.parametrize(
    "name,where",
    [
        ("wrong gradient", "dy"),
        ("one row", "dx"),
        ("off", "result"),
        ("nan", "result"),
        ("no gradient of scale", "dscale"),
    ],
)
def test_a_wrong_arm_fails_and_says_where(name, where):
    failed = verdict(name)
    assert not failed.passed
    assert where in failed.why


def test_one_part_in_a_thousand_is_wrong_in_fp32_and_within_rounding_in_bf16():
    errors = gate._Errors(torch.finfo(torch.bfloat16).eps)
    true = torch.randn(100, dtype=torch.float64)
    rounded = true.to(torch.bfloat16)
    errors.add({"result": rounded * 1.001}, {"result": rounded}, {"result": true})
    assert errors.verdict(())[0].passed
    errors.add({"result": rounded * 1.05}, {"result": rounded}, {"result": true})
    assert not errors.verdict(())[0].passed


def test_a_gradient_that_an_arm_lacks_by_design_is_said_not_compared():
    passed = verdict("lacks scale")
    assert passed.passed
    assert passed.lacks == ("scale",)
    assert "dscale" not in passed.errors


def test_an_arm_that_is_wrong_at_the_full_shape_alone_fails_there():
    assert verdict("wrong when large").passed
    failed = verdict("wrong when large", planted.LARGE)
    assert not failed.passed
    assert "full shape" in failed.why


def test_a_sample_of_the_batch_is_taken_at_the_full_shape():
    """An op whose rows are independent; wrong in the middle row of a large batch only."""

    def make(shape, problem):
        def step(x):
            keep = torch.ones(len(x), 1)
            if shape.n > 8:
                keep[shape.n // 2] = 1.01
            return x.sin() * keep

        return step

    def inputs(shape, device, seed):
        x = torch.randn(shape.n, shape.d, generator=torch.Generator().manual_seed(seed))
        return registry.Problem((x.requires_grad_(),), ("x",))

    op = registry.Op(
        "rows",
        inputs,
        lambda shape, problem: torch.sin,
        (),
        (),
        lambda shape, mode: registry.Work(),
        lambda shape: planted.SHAPE,
        check_full=lambda shape: True,
        batched=("x",),
    )
    assert op.prepare(planted.SHAPE, registry.Arm("a", make), "cpu").verdict.passed
    assert not op.prepare(planted.LARGE, registry.Arm("a", make), "cpu").verdict.passed


@pytest.mark.parametrize("name", ["contrastive", "sigmoid", "attention", "attention_pool", "fusion_pack"])
def test_ours_passes_and_a_planted_error_fails_at_every_tiny_shape(name):
    """The same in the real entries: their plain function is the truth, and their gate can fail."""
    entry = registry.find(name)
    ours = next(arm for arm in entry.arms if arm.role == "ours")
    for shape in registry.select(entry, "cpu", tiny=True)[:2]:
        assert entry.prepare(shape, ours, "cpu").verdict.passed

        def make(shape, problem):
            function = ours.make(shape, problem)
            return lambda *leaves: tuple(1.01 * result for result in gate.as_tuple(function(*leaves)))

        assert not entry.prepare(shape, registry.Arm("off", make), "cpu").verdict.passed


def test_the_blockwise_truth_is_the_whole_one(monkeypatch):
    for name in ("contrastive", "sigmoid"):
        entry = registry.find(name)
        shape = registry.select(entry, "cpu", tiny=True)[0]
        problem = entry.inputs(shape, "cpu", 0)
        leaves = gate.cast(problem.leaves, torch.float64)
        whole = gate.run(entry.plain(shape, problem), leaves, torch.float32)
        module = __import__(registry.home(entry), fromlist=["_BLOCK"])
        monkeypatch.setattr(module, "_BLOCK", 40)
        parts = list(entry.parts(shape, problem))
        assert len(parts) > 1
        blocks = gate.run_parts(parts, leaves, torch.float64)
        for a, b in zip(whole.results + whole.gradients, blocks.results + blocks.gradients):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
