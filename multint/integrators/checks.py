"""Checks of arguments: each raises an error that names the owner, the argument, what it got and what it expected."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from multint.errors import OptionError, OptionTypeError, ShapeError


def positive(owner: nn.Module, name: str, value: int) -> int:
    """The value, if it is a whole number of at least 1."""
    return whole(owner, name, value, 1)


def whole(owner: nn.Module, name: str, value: int, least: int) -> int:
    """The value, if it is a whole number of at least `least`."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < least:
        raise (OptionError if is_whole else OptionTypeError)(
            f"{type(owner).__name__}: {name} is {value!r}, expected a whole number of at least {least}"
        )
    return value


def flag(owner: nn.Module, name: str, value: bool) -> bool:
    """The value, if it is a bool: "False" would count as True, and a number is another argument's, out of place."""
    if not isinstance(value, bool):
        raise OptionTypeError(f"{type(owner).__name__}: {name} is {value!r}, expected True or False")
    return value


def number(owner: nn.Module, name: str, value: float, expected: str = "a number") -> float:
    """The value, if it is a finite number; a bool is refused, since True would quietly mean 1.0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise (OptionError if is_number else OptionTypeError)(
            f"{type(owner).__name__}: {name} is {value!r}, expected {expected}"
        )
    return value


def probability(owner: nn.Module, name: str, value: float, up_to_one: bool = False) -> float:
    """The value, if it is a number of at least 0 and below 1, or at most 1 where that is told."""
    upper = "at most 1" if up_to_one else "below 1"
    expected = f"a probability: at least 0 and {upper}"
    number(owner, name, value, expected)
    if not 0 <= value <= 1 or (value == 1 and not up_to_one):
        raise OptionError(f"{type(owner).__name__}: {name} is {value!r}, expected {expected}")
    return value


def check_callable(owner: nn.Module, name: str, value: Any, expected: str) -> None:
    """Raise an OptionTypeError for what cannot be called."""
    if not callable(value):
        raise OptionTypeError(f"{type(owner).__name__}: {name} is {value!r}, expected {expected}")


def check_factory(owner: nn.Module, argument: str, factory: Any, expected: str) -> None:
    """Raise an OptionTypeError for a module that is made already, or for what cannot be called."""
    if isinstance(factory, nn.Module) or not callable(factory):
        raise OptionTypeError(
            f"{type(owner).__name__}: {argument} is a {type(factory).__name__}, expected a factory {expected}, such as "
            "the class"
        )


def check_features(owner: nn.Module, stream: str, tensor: Tensor, features: int, name: str) -> None:
    """Raise a ShapeError unless it is a tensor whose last dimension is `features`."""
    if not isinstance(tensor, Tensor):
        raise ShapeError(
            f"{type(owner).__name__}: {stream} is a {type(tensor).__name__}, expected a tensor (..., {features})"
        )
    if tensor.ndim == 0 or tensor.shape[-1] != features:
        got = "no dimensions" if tensor.ndim == 0 else f"{tensor.shape[-1]} features"
        raise ShapeError(f"{type(owner).__name__}: {stream} has {got}, expected {features} ({name})")


def check_leading(owner: nn.Module, *streams: Tensor) -> None:
    """Raise a ShapeError unless the streams' leading shapes broadcast."""
    leading = [tuple(stream.shape[:-1]) for stream in streams]
    try:
        torch.broadcast_shapes(*leading)
    except RuntimeError:
        shown = " and ".join(map(str, leading))
        short, long = sorted(leading, key=len)[:: len(leading) - 1]
        hint = ""
        if len(short) < len(long) and long[: len(short)] == short:  # one of z (B, Z) for each set of x (B, N, X)
            shape = (*short, *[1] * (len(long) - len(short)))
            hint = f". They are matched from the right: unsqueeze the shorter to {shape}"
        raise ShapeError(
            f"{type(owner).__name__}: the streams' leading shapes {shown} do not broadcast; "
            f"expected equal sizes, or 1 where one stream is shared{hint}"
        ) from None
