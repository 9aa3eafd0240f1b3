"""Metrics of summaries, one file each; a new file in this folder is found by itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sparse_engine.discovery import Plugins
from sparse_engine.errors import InputError

if TYPE_CHECKING:
    from sparse_engine.evaluate.metrics.base import Metric

__all__ = ["all_metrics", "choose", "register"]

_PLUGINS: Plugins[Metric] = Plugins(__name__, "metric")
register = _PLUGINS.register


def all_metrics() -> dict[str, Metric]:
    """All metrics by name, sorted."""
    return dict(sorted(_PLUGINS.all().items()))


def choose(names: Iterable[str] | None) -> list[Metric]:
    """The metrics of these names; None gives all.

    Raises:
        InputError: there is no metric of a name.
    """
    known = all_metrics()
    chosen = list(known) if names is None else list(names)
    if unknown := [name for name in chosen if name not in known]:
        raise InputError(f"there is no metric {unknown[0]!r}: use {', '.join(known)}")
    return [known[name] for name in chosen]
