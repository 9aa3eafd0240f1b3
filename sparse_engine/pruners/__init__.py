"""Pruners, one file each; a new file in this folder is found by itself."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from sparse_engine.discovery import import_all
from sparse_engine.errors import InputError

if TYPE_CHECKING:
    from sparse_engine.pruners.base import Pruner

__all__ = ["all_pruners", "get", "register"]

_PRUNERS: dict[str, Pruner] = {}


def register(pruner: Pruner) -> None:
    """Make a pruner known under its name; called once at the end of its file."""
    _PRUNERS[pruner.name] = pruner


@cache
def _discover() -> None:
    import_all(__name__)


def all_pruners() -> dict[str, Pruner]:
    _discover()
    return dict(_PRUNERS)


def get(name: str) -> Pruner:
    """The pruner called ``name``.

    Raises:
        InputError: there is none.
    """
    pruners = all_pruners()
    if name not in pruners:
        raise InputError(f"unknown pruner {name!r}; known: {', '.join(sorted(pruners))}")
    return pruners[name]
