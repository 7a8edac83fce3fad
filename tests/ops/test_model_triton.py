"""A whole model on the kernels: both towers and the fusion, packed texts, pins that lack a modality."""

import copy
from importlib import import_module

import pytest
import torch
from ops_helpers import normal
from rows_cases import assert_step_does_not_wait, use_row_kernels
from test_attention_triton import use_kernels as use_attention_kernels
from triton_cases import interpret

from pinclip.models.pinclip import PinCLIP, PinCLIPConfig

SMALL = {
    "image": {"image_size": 32, "patch_size": 4, "width": 64, "depth": 2, "heads": 1, "funnel": [1]},
    "text": {"vocab_size": 40, "max_length": 9, "width": 128, "depth": 2, "heads": 2},
    "fusion": {"width": 64, "depth": 2, "heads": 1, "fusion_tokens": 2, "image_stages": "all"},
    "embed_dim": 16,
    "dims": [4, 16],
}
BATCH = {  # both, image, text, none, both, text
    "images": normal(3, 3, 32, 32, seed=1),
    "tokens": torch.arange(28).view(4, 7) % 40,
    "token_lengths": [3, 7, 1, 4],
    "image_rows": [0, 1, 4],
    "text_rows": [5, 0, 2, 4],
    "batch_size": 6,
}


def build() -> PinCLIP:
    torch.manual_seed(0)
    model = PinCLIP(PinCLIPConfig.model_validate(SMALL)).double()
    with torch.no_grad():
        for parameter in model.parameters():  # away from 0 and 1, where a forgotten one would not show
            parameter.add_(0.2 * torch.randn_like(parameter) if parameter.ndim < 2 else 0.0)
    return model


def results(model, device="cpu"):
    """Embeddings, and gradients of all parameters, in fp64 on the host."""
    dtype = next(model.parameters()).dtype
    there = {name: BATCH[name].to(device) for name in ("images", "tokens")}
    embeddings = model(**{**BATCH, **there, "images": there["images"].to(dtype)})
    found = {"image": embeddings.image, "text": embeddings.text, "fused": embeddings.fused}
    loss = sum((e * normal(*e.shape, seed=i).to(e)).sum() for i, e in enumerate(found.values()))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    found |= {name: g for (name, _), g in zip(model.named_parameters(), gradients)}
    return {name: each.detach().double().cpu() for name, each in found.items()}


def assert_as_exact(ours, plain, truth):
    """By the norm of each tensor, at most twice the error of plain torch in the same precision."""
    embeddings = ("image", "text", "fused")
    whole = max(true.norm() for name, true in truth.items() if name not in embeddings)
    for name, true in truth.items():
        error, allowed = ((each[name] - true).norm() for each in (ours, plain))
        rounding = torch.finfo(torch.float16).eps * (1.0 if name in embeddings else whole)
        assert error <= 2 * allowed + rounding, f"{name}: {error:.3g}, plain torch {allowed:.3g}"


def test_in_the_interpreter():
    interpret(__file__)


@pytest.fixture
def kernels(monkeypatch):
    """Attention, pooling and row ops run their kernels on the CPU; what is not written holds NaN."""
    pool = import_module("pinclip.ops.attention_pool")

    def use():
        use_attention_kernels(monkeypatch, 90)
        for stem in ("fusion_pack", "gated_residual_norm", "l2_normalize", "funnel_pool"):
            use_row_kernels(monkeypatch, stem)
        monkeypatch.setattr(pool, "_kernel_limits", lambda dtype, device: (16, 1152))

    yield use
    torch.use_deterministic_algorithms(False)


def check_a_whole_model(kernels, monkeypatch):
    from pinclip_kernels.triton.attention import Problem

    model = build()
    truth = results(model)
    model.half()
    plain = results(model)
    kernels()
    calls, forward = [], Problem.forward
    monkeypatch.setattr(Problem, "forward", lambda self, *t: (calls.append(self.n_q), forward(self, *t))[1])
    ours = results(model)
    assert_as_exact(ours, plain, truth)
    # Two layers of each tower, one of them behind a funnel; short texts and pins share tiles.
    assert sorted(calls) == [16, 64, 64, 64, 128, 128]


class TestGpu:
    pytestmark = pytest.mark.gpu

    def test_a_whole_model(self):
        torch.backends.cuda.matmul.allow_tf32 = False
        model = build()
        truth = results(model)
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            plain = results(model)
        with torch.autocast("cuda", torch.bfloat16):
            ours = results(copy.deepcopy(model).cuda(), "cuda")
        assert_as_exact(ours, plain, truth)

    def test_does_not_wait_for_the_gpu(self):
        model = build().bfloat16().cuda()
        images, tokens = BATCH["images"].bfloat16().cuda(), BATCH["tokens"].cuda()

        def step():
            embeddings = model(**{**BATCH, "images": images, "tokens": tokens})
            sum(each.square().sum() for each in embeddings).backward()

        assert_step_does_not_wait(step)
