"""Packed formats, one file each; a new file in this folder is found by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparse_engine.discovery import Plugins
from sparse_engine.errors import InputError

if TYPE_CHECKING:
    from sparse_engine.formats.base import Format
    from sparse_engine.pattern import SparsityPattern

__all__ = ["all_formats", "for_pattern", "get", "register"]

_PLUGINS: Plugins[Format] = Plugins(__name__, "packed format")
register, all_formats, get = _PLUGINS.register, _PLUGINS.all, _PLUGINS.get


def for_pattern(pattern: SparsityPattern) -> Format:
    """The first registered format that packs ``pattern``.

    Raises:
        InputError: no format does.
    """
    for fmt in all_formats().values():
        if fmt.accepts(pattern):
            return fmt
    raise InputError(f"no packed format accepts {pattern}")
