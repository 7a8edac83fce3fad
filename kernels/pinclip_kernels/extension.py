"""The one loader of the compiled extension `pinclip_kernels._C`, and what its functions take."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

BUILD_COMMAND = "pip install -e . --no-build-isolation"


@cache
def load() -> ModuleType:
    """The prebuilt extension; nothing is compiled here.

    Raises RuntimeError that states the build command where it is missing or does not load.
    """
    try:
        return importlib.import_module("pinclip_kernels._C")
    except ImportError as error:
        raise RuntimeError(
            f"the C++ extension pinclip_kernels._C cannot be loaded ({error}); "
            f"build it from the repository root with: {BUILD_COMMAND}"
        ) from error


def address(tensor: Tensor | None) -> int:
    """Where a tensor's values begin; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def graph(
    pin_indptr: Tensor,
    pin_boards: Tensor,
    board_indptr: Tensor,
    board_pins: Tensor,
    board_alias: Tensor | None = None,
):
    """A graph as the extension takes it: it borrows the tensors, which must outlive it."""
    lists = (pin_indptr, pin_boards, board_indptr, board_pins, board_alias)
    return load().Graph(*map(address, lists), pin_boards.dtype == torch.int64)


def walk_plan(starts: Tensor, first_walk: Tensor | None, walks: int, length: int, restart: float, seed: int):
    """Walks as the extension takes them: it borrows the tensors, which must outlive it."""
    plan = load().WalkPlan
    pointers = address(starts), address(first_walk)
    return plan(*pointers, starts.numel(), walks, length, int(restart * 2.0**32), seed)
