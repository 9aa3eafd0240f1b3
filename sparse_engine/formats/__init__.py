"""Packed formats, one file each; a new file in this folder is found by itself."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from sparse_engine.discovery import import_all
from sparse_engine.errors import InputError

if TYPE_CHECKING:
    from sparse_engine.formats.base import Format
    from sparse_engine.pattern import SparsityPattern

__all__ = ["all_formats", "for_pattern", "get", "register"]

_FORMATS: dict[str, Format] = {}


def register(fmt: Format) -> None:
    """Make a format known under its name; called once at the end of its file."""
    _FORMATS[fmt.name] = fmt


@cache
def _discover() -> None:
    import_all(__name__)


def all_formats() -> dict[str, Format]:
    _discover()
    return dict(_FORMATS)


def get(name: str) -> Format:
    """The format called ``name``.

    Raises:
        InputError: there is none.
    """
    formats = all_formats()
    if name not in formats:
        raise InputError(f"unknown packed format {name!r}; known: {', '.join(sorted(formats))}")
    return formats[name]


def for_pattern(pattern: SparsityPattern) -> Format:
    """The first registered format that packs ``pattern``.

    Raises:
        InputError: no format does.
    """
    for fmt in all_formats().values():
        if fmt.accepts(pattern):
            return fmt
    raise InputError(f"no packed format accepts {pattern}")
