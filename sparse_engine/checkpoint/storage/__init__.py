"""Ways of storing pruned linears in a checkpoint, one file each; a new file in this folder is found by itself."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from sparse_engine.discovery import import_all
from sparse_engine.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from sparse_engine.checkpoint.storage.base import Storage

__all__ = ["all_storages", "detect", "get", "register"]

_STORAGES: dict[str, Storage] = {}


def register(storage: Storage) -> None:
    """Make a storage known under its name; called once at the end of its file."""
    _STORAGES[storage.name] = storage


@cache
def _discover() -> None:
    import_all(__name__)


def all_storages() -> dict[str, Storage]:
    _discover()
    return dict(_STORAGES)


def get(name: str) -> Storage:
    """The storage called ``name``.

    Raises:
        InputError: there is none.
    """
    storages = all_storages()
    if name not in storages:
        raise InputError(f"unknown output format {name!r}; known: {', '.join(sorted(storages))}")
    return storages[name]


def detect(config: dict[str, Any]) -> Storage:
    """The storage that a checkpoint's ``config`` (config.json) declares.

    Raises:
        CheckpointError: it declares a quantisation that none of them reads.
    """
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    for storage in all_storages().values():
        if storage.quant_method == method:
            return storage
    raise CheckpointError(f"the checkpoint is quantised by {method!r}; give a dense, sparse_engine or compressed-tensors sparse checkpoint")
