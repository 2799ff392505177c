"""``NAME=VALUE`` on the command line as keyword arguments of a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from .errors import UserError

TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

# In the order in which a value is tried where an argument takes several types.
CONVERTERS: dict[type, Callable[[str], Any]] = {
    bool: lambda value: TRUTH[value.lower()],
    int: int,
    float: float,
    str: str,
}


def keyword_arguments(
    name: str, function: Callable[..., Any], pairs: Iterable[str], decided: Iterable[str] = ()
) -> dict[str, Any]:
    """``layers=3 linear=exact`` as a dictionary, converted as the function's annotations ask.

    Args:
        name: what the function is called in messages.
        function: whose arguments they are.
        pairs: of the form NAME=VALUE.
        decided: arguments that are not for the command line.

    Raises:
        UserError: an unknown name, or a value that is not of the argument's type.

    >>> def model(layers: int = 2, inverse_size: int | None = None, bias: bool = True): ...
    >>> keyword_arguments("model", model, ["inverse_size=5", "bias=no"])
    {'inverse_size': 5, 'bias': False}
    """
    kinds = {key: kind for key, kind in _kinds(function).items() if key not in decided}
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key not in kinds:
            raise UserError(
                f"model_args of {name} must be NAME=VALUE, NAME one of {', '.join(kinds)}; "
                f"got {pair!r}"
            )
        arguments[key] = _convert(key, value, kinds[key])
    return arguments


def _kinds(function: Callable[..., Any]) -> dict[str, tuple[type, ...]]:
    """The types that each argument takes, by its annotation or else its default."""
    hints = get_type_hints(function)
    kinds = {}
    for key, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(key, type(parameter.default))
        kinds[key] = tuple(get_args(hint)) if isinstance(hint, UnionType) else (hint,)
    return kinds


def _convert(name: str, value: str, kinds: tuple[type, ...]) -> Any:
    if NoneType in kinds and value.lower() == "none":
        return None
    known = [kind for kind in CONVERTERS if kind in kinds] or [str]
    for kind in known:
        with suppress(ValueError, KeyError):
            return CONVERTERS[kind](value)
    wanted = " or ".join(kind.__name__ for kind in known)
    raise UserError(f"{name} must be of type {wanted}; got {value!r}")
