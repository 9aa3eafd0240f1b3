"""How the kept values of a packed weight are stored, one file per type; a new file in this folder is found by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparse_engine.discovery import Plugins
from sparse_engine.errors import InputError

if TYPE_CHECKING:
    import torch

    from sparse_engine.value_types.base import ValueType

__all__ = ["PLAIN", "all_value_types", "get", "of_element", "quantised", "register"]

PLAIN = "plain"
"""Values of the weight's own floating type."""

_PLUGINS: Plugins[ValueType] = Plugins(__name__, "type of values")
register, all_value_types, get = _PLUGINS.register, _PLUGINS.all, _PLUGINS.get


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
