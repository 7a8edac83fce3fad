"""Argument checks and dtype rules that the ops share. A failed check is a ValueError with name and value."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def require(condition: bool, name: str, expected: str, value: object, **sizes: int) -> None:
    """Raise ValueError "`name` must `expected`, but is `value`" unless `condition`.

    sizes: of tensors, that `expected` names in braces; a string made of them beforehand would have
    torch.compile begin anew for each."""
    if not condition:
        raise ValueError(f"{name} must {expected.format(**sizes)}, but is {value}")


def check_float(name: str, tensor: Tensor) -> None:
    require(tensor.is_floating_point(), name, "be a floating-point tensor", tensor.dtype)


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...], legend: str) -> None:
    """The tensor has this shape, None for any size; `legend` is the shape in the docstring's letters."""
    fits = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape)
    )
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape {legend} = [{sizes}], but has {list(tensor.shape)}")


def check_key_lengths(key_lengths: Tensor, batch: int, first: str, reference: Tensor) -> None:
    """int32 or int64 [B] on the device of `reference`, whose name is `first`."""
    integer = key_lengths.dtype in (torch.int32, torch.int64)
    require(integer, "key_lengths", "be an int32 or int64 tensor", key_lengths.dtype)
    check_shape("key_lengths", key_lengths, (batch,), "[B]")
    check_device(first, reference, key_lengths=key_lengths)


def check_alike(first: str, reference: Tensor, **others: Tensor) -> None:
    """All tensors have the device and, unless autocast will see to it, the dtype of `reference`."""
    if not _autocast_is_on(reference.device.type):
        for name, tensor in others.items():
            same = tensor.dtype == reference.dtype
            require(same, name, f"have the dtype {reference.dtype} of {first}", tensor.dtype)
    check_device(first, reference, **others)


def check_device(first: str, reference: Tensor, **others: Tensor) -> None:
    """All tensors are on the device of `reference`, whose name is `first`."""
    for name, tensor in others.items():
        here = tensor.device == reference.device
        require(here, name, f"be on the device {reference.device} of {first}", tensor.device)


def promoted_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the tensors' sum, by torch's promotion among tensors with dimensions."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as a matrix product sees them: in autocast's dtype where it is on, but for fp64."""
    device_type = tensors[0].device.type
    if not _autocast_is_on(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def _autocast_is_on(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(body: Callable) -> Callable:
    """An op's body, run with autocast off.

    Autocast acts above an op and has chosen its dtypes already; left on, it would act again on the products
    inside, and in a backward pass that runs under autocast it would round gradients of fp32 inputs.
    """

    @functools.wraps(body)
    def run(*args):
        device_type = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        if not _autocast_is_on(device_type):
            return body(*args)
        with torch.autocast(device_type, enabled=False):
            return body(*args)

    return run
