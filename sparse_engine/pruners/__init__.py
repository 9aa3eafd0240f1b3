"""Pruners, one file each; a new file in this folder is found by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparse_engine.discovery import Plugins

if TYPE_CHECKING:
    from sparse_engine.pruners.base import Pruner

__all__ = ["all_pruners", "get", "register"]

_PLUGINS: Plugins[Pruner] = Plugins(__name__, "pruner")
register, all_pruners, get = _PLUGINS.register, _PLUGINS.all, _PLUGINS.get
