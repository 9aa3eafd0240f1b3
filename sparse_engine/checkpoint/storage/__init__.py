"""Ways of storing pruned linears in a checkpoint, one file each; a new file in this folder is found by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparse_engine.discovery import Plugins
from sparse_engine.errors import CheckpointError

if TYPE_CHECKING:
    from sparse_engine.checkpoint.storage.base import Storage

__all__ = ["all_storages", "detect", "get", "register"]

_PLUGINS: Plugins[Storage] = Plugins(__name__, "output format")
register, all_storages, get = _PLUGINS.register, _PLUGINS.all, _PLUGINS.get


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
