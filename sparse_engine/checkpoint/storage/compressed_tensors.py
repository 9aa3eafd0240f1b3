"""The sparse bitmask layouts of compressed-tensors up to 0.14, which later releases and vLLM no longer read.

``sparse-24-bitmask``: ``compressed`` (R, C/2), ``bitmask`` (R, ceil(C/8)), ``shape`` int64 (2, 1).
``sparse-bitmask``: ``compressed`` (nnz,), ``bitmask``, ``row_offsets`` int64 (R,) where each row starts, ``shape`` int64 (2,).
Both bitmasks are little-endian. Linears that are no decoder linears (a pruned lm_head) may be stored this way too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine import formats
from sparse_engine.checkpoint.storage import register
from sparse_engine.checkpoint.storage.base import LayerSpec, Storage
from sparse_engine.errors import CheckpointError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.pattern import SparsityPattern
from sparse_engine.value_types import PLAIN

if TYPE_CHECKING:
    from sparse_engine.checkpoint.reader import Checkpoint

_TWO_FOUR = SparsityPattern.nm(2, 4)
_LAST_VERSION = "0.14.0"
_FORMAT_24, _FORMAT_ANY = "sparse-24-bitmask", "sparse-bitmask"


class CompressedTensorsStorage(Storage):
    name = "compressed-tensors"
    quant_method = "compressed-tensors"

    def layers(self, checkpoint: Checkpoint) -> dict[str, LayerSpec]:
        kind = _declared_format(checkpoint)
        found: dict[str, LayerSpec] = {}
        for name in checkpoint.names():
            linear, _, part = name.rpartition(".")
            if part != "compressed":
                continue
            stored, dtype = checkpoint.spec(name)
            shape = tuple(int(size) for size in checkpoint.tensor(f"{linear}.shape").flatten())
            if len(shape) != 2 or shape != checkpoint.linear_shape(linear):
                raise CheckpointError(
                    f"{checkpoint.path}: {linear}.shape says {shape}, where the model has {checkpoint.linear_shape(linear)}"
                )
            nnz = stored[0] * stored[1] if len(stored) == 2 else stored[0]
            removed = 1 - nnz / (shape[0] * shape[1])
            pattern = _TWO_FOUR if kind == _FORMAT_24 else SparsityPattern.unstructured(min(max(round(removed, 4), 1e-4), 1 - 1e-4))
            found[linear] = LayerSpec(pattern, (shape[0], shape[1]), dtype, nnz)
        return found

    def read(self, checkpoint: Checkpoint, linear: str) -> PackedWeight:
        spec = checkpoint.packed_layers[linear]
        values = checkpoint.tensor(f"{linear}.compressed")
        # A kept -0.0 is possible there; packed weights hold +0.0 alone.
        tensors = {"values": torch.where(values == 0, torch.zeros_like(values), values), "bitmask": checkpoint.tensor(f"{linear}.bitmask")}
        if not spec.pattern.is_nm:
            starts = checkpoint.tensor(f"{linear}.row_offsets")
            tensors["row_offsets"] = F.pad(starts, (0, 1), value=spec.nnz)
        return PackedWeight(spec.format, 1, spec.pattern, spec.shape, spec.dtype, tensors)

    def refuses(self, value_type: str) -> str | None:
        if value_type == PLAIN:
            return None
        return (
            f"compressed-tensors' sparse layouts hold no {value_type} values: write --format packed or dense, "
            "or convert the checkpoint that was not quantised without --values"
        )

    def encode(self, linear: str, packed: PackedWeight) -> dict[str, Tensor]:
        shape = torch.tensor(packed.shape, dtype=torch.int64)
        encoded = {"compressed": packed.tensors["values"], "bitmask": packed.tensors["bitmask"]}
        if packed.pattern == _TWO_FOUR:
            encoded["shape"] = shape.view(2, 1)
        else:
            kept = formats.get(packed.format).keep(packed).sum(1)
            encoded |= {"compressed": packed.tensors["values"].flatten(), "row_offsets": kept.cumsum(0) - kept, "shape": shape}
        return {f"{linear}.{part}": tensor for part, tensor in encoded.items()}

    def config(self, config: dict[str, Any], layers: Mapping[str, LayerSpec]) -> dict[str, Any]:
        two_four = all(spec.pattern == _TWO_FOUR for spec in layers.values())
        if not two_four and any(spec.pattern == _TWO_FOUR for spec in layers.values()):
            raise CheckpointError("compressed-tensors holds one sparse format per checkpoint; this one mixes 2:4 with other patterns")
        weights = sum(spec.shape[0] * spec.shape[1] for spec in layers.values())
        sparsity = {
            "format": _FORMAT_24 if two_four else _FORMAT_ANY,
            "global_sparsity": 1 - sum(spec.nnz for spec in layers.values()) / max(weights, 1),
            "ignore": ["lm_head"],
            "sparsity_structure": "2:4" if two_four else "unstructured",
            "targets": ["Linear"],
        }
        declared = {"quant_method": self.quant_method, "sparsity_config": sparsity, "version": _LAST_VERSION}
        return config | {"quantization_config": declared}


def _declared_format(checkpoint: Checkpoint) -> str:
    declared = checkpoint.config["quantization_config"]
    if declared.get("config_groups"):
        raise CheckpointError(
            f"{checkpoint.path} is quantised as well as sparse; only unquantised {_FORMAT_24} and {_FORMAT_ANY} checkpoints can be read"
        )
    kind = str((declared.get("sparsity_config") or {}).get("format"))
    if kind not in (_FORMAT_24, _FORMAT_ANY):
        raise CheckpointError(f"{checkpoint.path} holds compressed-tensors format {kind!r}; {_FORMAT_24} and {_FORMAT_ANY} can be read")
    return kind


register(CompressedTensorsStorage())
