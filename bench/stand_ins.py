"""Stand-ins for pydantic and safetensors, so that the model's modules import where there is torch alone.

A GPU machine of a campaign may have nothing else. The sizes used there are constants of this folder, so
nothing needs validating, and no weights are read. Where the real libraries are installed they are used.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


class BaseModel:
    """Keyword arguments and class defaults as attributes; nothing is checked."""

    def __init__(self, **values: Any):
        known = {name for base in type(self).__mro__ for name in getattr(base, "__annotations__", {})}
        unknown = set(values) - known
        if unknown:
            raise TypeError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        for name in known:
            default = getattr(type(self), name, None)
            self.__dict__[name] = values.get(
                name, default.default if isinstance(default, _Field) else default
            )


class _Field:
    def __init__(self, default: Any):
        self.default = default


def Field(default: Any = None, **_constraints: Any) -> Any:
    return _Field(default)


def install() -> None:
    """Put a stand-in in the place of each library that cannot be imported."""

    def nothing(*args, **kwargs):
        raise ImportError("safetensors is not installed")

    fakes = {
        "pydantic": {
            "BaseModel": BaseModel,
            "ConfigDict": dict,
            "Field": Field,
            "ValidationError": ValueError,
            "model_validator": lambda **_options: lambda function: function,
        },
        "safetensors": {"SafetensorError": ValueError, "safe_open": nothing},
        "safetensors.torch": {"load_file": nothing, "save_file": nothing},
    }
    for name, contents in fakes.items():
        try:
            importlib.import_module(name)
        except ImportError:
            fake = types.ModuleType(name)
            vars(fake).update(contents)
            sys.modules[name] = fake
