"""The pair losses' kernels in half precision against the usual loss in half precision, at every scale.

`assert_as_exact` elsewhere compares with plain torch that computes in fp32 from the same inputs. Here plain
torch keeps logits, probabilities and products in the dtype of the inputs, as a model under autocast does.
"""

import pytest
import torch
import torch.nn.functional as F
from pair_cases import embeddings, value_and_grads
from triton_cases import interpret, use_kernels

import pinclip.ops.contrastive as contrastive
import pinclip.ops.sigmoid as sigmoid

SCALES = (1e-3, 1.0, 14.3, 100.0, 1e4)


def plain_softmax(x, y, scale):
    logits = scale.to(x.dtype) * x @ y.T
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def plain_sigmoid(x, y, scale, bias):
    logits = scale.to(x.dtype) * x @ y.T + bias.to(x.dtype)
    signs = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(x)


LOSSES = {
    "softmax": (contrastive.contrastive_loss, plain_softmax),
    "sigmoid": (sigmoid.sigmoid_loss, plain_sigmoid),
}


def compare(kind, n, d, scale, dtype, device="cpu"):
    op, plain = LOSSES[kind]
    x, y = (each.to(device) for each in embeddings(n, n, d, dtype=dtype))
    scalars = [torch.tensor(scale, device=device)]
    if kind == "sigmoid":
        scalars.append(torch.tensor(-5.0, device=device))
    ours, usual = value_and_grads(op, x, y, *scalars), value_and_grads(plain, x, y, *scalars)
    truth = value_and_grads(plain, x.double(), y.double(), *(each.double() for each in scalars))
    for name, a, b, true in zip(("loss", "x", "y", "scale", "bias"), ours, usual, truth):
        error, allowed = ((each.double() - true).abs().max().item() for each in (a, b))
        least = 1e-6 * true.abs().max().item()
        assert error <= 2 * allowed + least, f"{name}: {error:.3g}, plain {dtype} {allowed:.3g}"


def test_in_the_interpreter():
    interpret(__file__)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", LOSSES)
def check_error_in_fp16(kind, scale, monkeypatch):
    use_kernels(monkeypatch, contrastive if kind == "softmax" else sigmoid)
    try:
        compare(kind, 65, 50, scale, torch.float16)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", LOSSES)
def test_error_on_the_gpu(kind, scale, dtype):
    for n, d in ((4096, 512), (1000, 1152)):
        compare(kind, n, d, scale, dtype, "cuda")
