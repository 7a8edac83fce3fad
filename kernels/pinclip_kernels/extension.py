"""The one loader of the compiled extension `pinclip_kernels._C`."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

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
