"""Model families, one file each; a new file in this folder is found by itself."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from sparse_engine.discovery import import_all
from sparse_engine.errors import CheckpointError

if TYPE_CHECKING:
    from sparse_engine.models.base import ModelFamily

__all__ = ["all_families", "for_config", "register"]

_FAMILIES: dict[str, ModelFamily] = {}


def register(family: ModelFamily) -> None:
    """Make a family known under its model types; called once at the end of its file."""
    for model_type in family.model_types:
        _FAMILIES[model_type] = family


@cache
def _discover() -> None:
    import_all(__name__)


def all_families() -> dict[str, ModelFamily]:
    """The families by every model type that they read."""
    _discover()
    return dict(_FAMILIES)


def for_config(config: dict[str, Any]) -> ModelFamily:
    """The family that reads a checkpoint with this config.json, which it has validated.

    Raises:
        CheckpointError: the architecture is not supported, or the config is not usable.
    """
    families = all_families()
    model_type = config.get("model_type")
    if model_type not in families:
        raise CheckpointError(f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(families))}")
    family = families[model_type]
    family.validate(config)
    return family
