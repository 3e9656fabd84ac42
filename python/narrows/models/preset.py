"""Estimators that change or fix some parameters of another estimator.

- scikit-learn's get_params, set_params, clone, repr and searches work, because the signature can be inspected.
- The base class alone says what a parameter means.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

__all__ = ["preset"]

T = TypeVar("T")


def preset(*, fixed: Mapping[str, Any] | None = None, **defaults: Any) -> Callable[[type[T]], type[T]]:
    """Class decorator that derives ``__init__`` from the base class.

    A class that has parameters of its own lists them in an ``__init__`` without a body, whose ``**inherited`` stands
    for those of the base class.

    Parameters
    ----------
    fixed : mapping of str to values
        Parameters that the class does not have: class attributes with these values replace them.
    **defaults
        New defaults of parameters that the class keeps.

    Raises
    ------
    TypeError
        The base class has no such parameter.
    """
    constants = dict(fixed or {})

    def decorate(cls: type[T]) -> type[T]:
        inherited = inspect.signature(cls.__mro__[1].__init__).parameters  # type: ignore[misc]
        own = inspect.signature(vars(cls)["__init__"]).parameters if "__init__" in vars(cls) else {}
        unknown = (constants.keys() | defaults.keys()) - inherited.keys()
        if unknown:
            raise TypeError(f"{cls.__name__}: no such parameters to preset: {sorted(unknown)}")
        parameters = {n: p.replace(default=defaults.get(n, p.default)) for n, p in inherited.items()}
        parameters |= {n: p for n, p in own.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
        signature = inspect.Signature([p for n, p in parameters.items() if n not in constants])

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                bound = signature.bind(self, *args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{cls.__name__}.__init__() {error}") from None
            bound.apply_defaults()
            for name, value in list(bound.arguments.items())[1:]:
                setattr(self, name, value)

        __init__.__signature__ = signature  # type: ignore[attr-defined]
        __init__.__qualname__ = f"{cls.__qualname__}.__init__"
        __init__.__module__ = cls.__module__
        cls.__init__ = __init__  # type: ignore[method-assign]
        for name, value in constants.items():
            setattr(cls, name, value)
        return cls

    return decorate
