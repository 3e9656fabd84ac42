"""Checks of an estimator's parameters; each estimator class names the check of each parameter in `_constraints`.

- A bad value gives one line with the parameter, the value and the choices.
- TypeError for a value of the wrong type, ValueError for a value out of range.
- Nothing here changes a parameter.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .protocol import Estimator

__all__ = [
    "Check",
    "boolean",
    "check_parameters",
    "choice",
    "filter_counts",
    "hidden_sizes",
    "image_shape",
    "integer",
    "kernel_steps",
    "layer_sizes",
    "pairs_by_layer",
    "plain_parameters",
    "randomness",
    "real",
    "row_order",
    "verbosity",
]

Check = Callable[[str, Any], None]
"""Takes the name and the value of a parameter; raises if the value is not allowed."""


def check_parameters(estimator: Estimator) -> None:
    """Check each parameter of an estimator, and then whether the parameters go together.

    Raises
    ------
    TypeError
        A parameter has the wrong type.
    ValueError
        A parameter is out of range, or two parameters do not go together.
    """
    for name, check in estimator._constraints.items():
        check(name, getattr(estimator, name))
    estimator._check_together()


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)


def integer(low: int, *, optional: bool = False) -> Check:
    """An integer of at least `low`; None too if `optional`."""

    def check(name: str, value: Any) -> None:
        if optional and value is None:
            return
        if not _is_integer(value):
            raise TypeError(f"{name}={value!r} must be an integer of at least {low}")
        if value < low:
            raise ValueError(f"{name}={value!r} must be at least {low}")

    return check


def real(interval: str, *, optional: bool = False) -> Check:
    """A number in an interval written as in mathematics, such as ``"[0, 1)"``; None too if `optional`."""
    low, high = (float(part) for part in interval[1:-1].split(","))
    or_none = " or None" if optional else ""

    def check(name: str, value: Any) -> None:
        if optional and value is None:
            return
        if not _is_real(value):
            raise TypeError(f"{name}={value!r} must be a number in {interval}{or_none}")
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise ValueError(f"{name}={value!r} must be in {interval}{or_none}")

    return check


def choice(options: Sequence[str], *, optional: bool = False) -> Check:
    """One of some strings; None too if `optional`."""
    listed = ", ".join((*options, "None") if optional else options)

    def check(name: str, value: Any) -> None:
        if optional and value is None:
            return
        if not isinstance(value, str):
            raise TypeError(f"{name}={value!r} must be one of {listed}")
        if value not in options:
            raise ValueError(f"{name}={value!r} must be one of {listed}")

    return check


def boolean(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}={value!r} must be True or False")


def row_order(name: str, value: Any) -> None:
    """True, False or ``"blocks"``."""
    if not (isinstance(value, bool | np.bool_) or (isinstance(value, str) and value == "blocks")):
        raise TypeError(f"{name}={value!r} must be True, False or 'blocks'")


def verbosity(name: str, value: Any) -> None:
    """A boolean or an integer of at least 0."""
    if not isinstance(value, numbers.Integral | np.bool_) or value < 0:
        raise TypeError(f"{name}={value!r} must be 0 (silent), 1 (a bar) or 2 (one line per epoch)")


def layer_sizes(*, optional: bool = False) -> Check:
    """A width or a sequence of widths; None too if `optional`."""

    def check(name: str, value: Any) -> None:
        if not (optional and value is None):
            hidden_sizes(name, value)

    return check


def randomness(name: str, value: Any) -> None:
    """What `random_state` may be."""
    if value is None or isinstance(value, np.random.RandomState | np.random.Generator):
        return
    if not _is_integer(value):
        raise TypeError(f"{name}={value!r} must be None, an integer, a RandomState or a Generator")
    if not 0 <= value < 2**64:
        raise ValueError(f"{name}={value!r} must be in [0, 2**64)")


def image_shape(name: str, value: Any) -> None:
    """Height, width and channels; length and channels; or None. One number may be -1."""
    wrong = f"{name}={value!r} must be (height, width, channels), (length, channels) or None, with at most one -1"
    if value is None:
        return
    if not _is_sequence(value) or not all(map(_is_integer, value)):
        raise TypeError(wrong)
    if len(value) not in (2, 3) or any(n < 1 and n != -1 for n in value) or list(value).count(-1) > 1:
        raise ValueError(wrong)


def filter_counts(name: str, value: Any) -> None:
    """Channels of at least one convolution."""
    if not hidden_sizes(name, value):
        raise ValueError(f"{name}={value!r} must have one item for each convolution, and at least one item")


def kernel_steps(name: str, value: Any) -> None:
    """An integer, or one item for each layer: an integer or a pair."""
    wrong = f"{name}={value!r} must be a positive integer, or have one integer or one pair of integers for each layer"
    items = [value] if _is_integer(value) else value
    if not _is_sequence(items):
        raise TypeError(wrong)
    for item in items:
        pair = [item] if _is_integer(item) else item
        if not _is_sequence(pair) or not all(map(_is_integer, pair)):
            raise TypeError(wrong)
        if len(pair) not in (1, 2) or (pair is item and len(pair) != 2) or any(n < 1 for n in pair):
            raise ValueError(wrong)


def pairs_by_layer(name: str, value: Any, n_layers: int, signal: bool) -> list[tuple[int, int]]:
    """Height and width for each layer, from one integer or from one item for each layer; a signal has height 1."""
    items = [value] * n_layers if _is_integer(value) else list(value)
    if len(items) != n_layers:
        raise ValueError(f"{name}={value!r} has {len(items)} items, but filters has {n_layers}")
    pairs = [(1 if signal else int(i), int(i)) if _is_integer(i) else (int(i[0]), int(i[1])) for i in items]
    if signal and any(height != 1 for height, _ in pairs):
        raise ValueError(f"{name}={value!r}: a signal has height 1")
    return pairs


def hidden_sizes(name: str, value: Any) -> tuple[int, ...]:
    """Widths of hidden layers, from one integer or a sequence of integers."""
    listed = [value] if _is_integer(value) else value
    if not _is_sequence(listed):
        raise TypeError(f"{name}={value!r} must be a positive integer or a sequence of them")
    for size in listed:
        if not _is_integer(size):
            raise TypeError(f"{name}={value!r} must hold positive integers, not {size!r}")
        if size < 1:
            raise ValueError(f"{name}={value!r} must hold positive integers, not {size!r}")
    return tuple(int(size) for size in listed)


def _plain_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(_plain_tuple(i) if isinstance(i, list | tuple | np.ndarray) else int(i) for i in value)


def plain_parameters(estimator: Estimator) -> dict[str, Any]:
    """The parameters as JSON-able values; a generator becomes None, because its draw is not a parameter."""
    plain: dict[str, Any] = {}
    for name, value in estimator.get_params(deep=False).items():
        if isinstance(value, np.random.RandomState | np.random.Generator):
            value = None
        elif isinstance(value, np.generic):
            value = value.item()
        elif isinstance(value, list | tuple | np.ndarray):
            value = _plain_tuple(value)
        plain[name] = value
    return plain
