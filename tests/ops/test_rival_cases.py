"""The cases that MemoryEfficientCLIP publishes for its losses (batch, width, temperature, prefixes, its own
tolerances or tighter), run on ours; what has no counterpart here (debiasing, label smoothing, rescaled
gradients) is left out. open_clip's losses themselves are compared in tests/dist/test_clip.py."""

import pytest
import torch
import torch.nn.functional as F

from pinclip.ops import contrastive_loss

TEMPERATURE, WIDTH = 0.07, 256
DIMS = [None, (64, 256), (64, 128, 256), (32, 96, 256), (256,)]
BF16_ON_GPU = pytest.param("cuda", torch.bfloat16, 5e-2, marks=pytest.mark.gpu, id="bf16 GPU")
FP32_ON_GPU = pytest.param("cuda", torch.float32, 1e-3, marks=pytest.mark.gpu, id="fp32 GPU")
ON_CPU = pytest.param("cpu", torch.float32, 1e-5, id="fp32 CPU")


def dense(x, y, dims, both):
    """The mean over prefixes of the loss from the whole matrix of logits."""
    losses = []
    for d in dims or (None,):
        a, b = (x, y) if d is None else (F.normalize(t[:, :d], dim=1) for t in (x, y))
        logits, labels = a @ b.T / TEMPERATURE, torch.arange(len(x), device=x.device)
        rows = F.cross_entropy(logits, labels)
        losses.append((rows + F.cross_entropy(logits.T, labels)) / 2 if both else rows)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("device,dtype,tolerance", [ON_CPU, FP32_ON_GPU, BF16_ON_GPU])
@pytest.mark.parametrize("both", [True, False], ids=["CLIP", "LiT, y locked"])
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("batch", [1024, 1000])
def test_memory_efficient_clips_cases(device, dtype, tolerance, both, dims, batch):
    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(batch, WIDTH, generator=generator), dim=1) for _ in range(2))
    x, y = (t.to(device, dtype) for t in (x, y))

    def gradients(loss_of, x, y):
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_(both)
        loss = loss_of(x, y)
        loss.backward()
        assert (y.grad is None) == (not both)
        return [loss.detach(), x.grad, *([y.grad] if both else [])]

    direction = "symmetric" if both else "rows"
    ours = gradients(
        lambda a, b: contrastive_loss(a, b, 1 / TEMPERATURE, direction=direction, dims=dims), x, y
    )
    truth = gradients(lambda a, b: dense(a, b, dims, both), x.double(), y.double())
    for got, true in zip(ours, truth):
        assert (got.double() - true).abs().max() <= tolerance * true.abs().max()
