"""How the kept values of a packed weight are stored, one file per type; a new file in this folder is found by itself."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from sparse_engine.discovery import import_all
from sparse_engine.errors import InputError

if TYPE_CHECKING:
    import torch

    from sparse_engine.value_types.base import ValueType

__all__ = ["PLAIN", "all_value_types", "get", "of_element", "quantised", "register"]

PLAIN = "plain"
"""Values of the weight's own floating type."""

_VALUE_TYPES: dict[str, ValueType] = {}


def register(value_type: ValueType) -> None:
    """Make a value type known under its name; called once at the end of its file."""
    _VALUE_TYPES[value_type.name] = value_type


@cache
def _discover() -> None:
    import_all(__name__)


def all_value_types() -> dict[str, ValueType]:
    _discover()
    return dict(_VALUE_TYPES)


def get(name: str) -> ValueType:
    """The value type called ``name``.

    Raises:
        InputError: there is none.
    """
    known = all_value_types()
    if name not in known:
        raise InputError(f"unknown type of values {name!r}; known: {', '.join(sorted(known))}")
    return known[name]


def quantised(name: str) -> ValueType:
    """The value type called ``name``, which must store fewer bits than the weight has.

    Raises:
        InputError: it is unknown, or the plain one.
    """
    choices = sorted(all_value_types().keys() - {PLAIN})
    if name not in choices:
        raise InputError(f"values can be quantised to {' or '.join(choices)}, got {name!r}")
    return get(name)


def of_element(element: torch.dtype) -> str:
    """The name of the value type whose ``values`` tensor has this type."""
    found = (name for name, kind in all_value_types().items() if kind.element(element) == element)
    return next((name for name in found if name != PLAIN), PLAIN)
