"""Which ops over rows run the Triton kernels, and how they hand their rows over."""

import math

import torch
from torch import Tensor

from pinclip.ops._checks import promoted_dtype

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WIDEST = 2048  # features of a row that a program holds whole


def on_gpu(*tensors: Tensor) -> bool:
    """Whether these tensors are for the kernels: on a GPU from sm_80 on, but not in fp64."""
    if not tensors[0].is_cuda or promoted_dtype(*tensors) not in _DTYPES:
        return False
    return torch.cuda.get_device_capability(tensors[0].device) >= (8, 0)


def runs_triton(width: int, *tensors: Tensor) -> bool:
    """The same for a kernel that holds rows of `width` features whole."""
    return 0 < width <= _WIDEST and on_gpu(*tensors)


def as_rows(tensor: Tensor) -> Tensor:
    """[..., D] as contiguous [n, D]."""
    return tensor.contiguous().view(math.prod(tensor.shape[:-1]), tensor.shape[-1])
