"""The learnable scale and bias of a pair loss."""

import math

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """scale = min(exp(log_scale), max_scale), bias as it is: both 0-d, at least fp32, both learnt.

    The parameters are of shape [1]: DeepSpeed 0.19 cannot broadcast a 0-d one.

    The gradient passes the clamp as if it were not there, so that a scale that stands at its bound can come
    back, and so that the gradient averaged over ranks does not depend on how the batch was split.

    Args: init_scale > 0, at most max_scale (14.3 = 1/0.07 for a softmax loss, 10 for a sigmoid loss);
    init_bias: None for no bias (softmax), -10 as in SigLIP. Raises ValueError naming the argument.
    """

    def __init__(
        self, init_scale: float = 1 / 0.07, init_bias: float | None = None, max_scale: float = 100.0
    ) -> None:
        super().__init__()
        if not max_scale > 0:
            raise ValueError(f"max_scale={max_scale} is not positive")
        if not 0 < init_scale <= max_scale:
            raise ValueError(f"init_scale={init_scale} is not in (0, max_scale={max_scale}]")
        self.max_scale = max_scale
        self.log_scale = nn.Parameter(torch.tensor([math.log(init_scale)], dtype=torch.float32))
        self.bias = None
        if init_bias is not None:
            self.bias = nn.Parameter(torch.tensor([float(init_bias)], dtype=torch.float32))

    def forward(self) -> tuple[Tensor, Tensor | None]:
        log_scale = _widen(self.log_scale)
        over = (log_scale.detach() - math.log(self.max_scale)).clamp_min(0)
        return (log_scale - over).exp(), None if self.bias is None else _widen(self.bias)


def _widen(parameter: Tensor) -> Tensor:
    """0-d, at least fp32: an engine may have cast the module to bf16, whose steps at log 100 are of 3%."""
    return parameter.squeeze(0).to(torch.promote_types(parameter.dtype, torch.float32))
