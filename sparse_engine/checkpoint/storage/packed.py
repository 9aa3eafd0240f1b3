"""This project's own storage: the packed format's tensors as they are, and each linear's pattern in config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparse_engine import formats
from sparse_engine.checkpoint.storage import register
from sparse_engine.checkpoint.storage.base import LayerSpec, Storage
from sparse_engine.errors import CheckpointError, InputError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.pattern import SparsityPattern

if TYPE_CHECKING:
    from sparse_engine.checkpoint.reader import Checkpoint

VERSION = 1


class PackedStorage(Storage):
    name = "packed"
    quant_method = "sparse_engine"

    def layers(self, checkpoint: Checkpoint) -> dict[str, LayerSpec]:
        declared = checkpoint.config["quantization_config"]
        if declared.get("version") != VERSION:
            raise CheckpointError(
                f"{checkpoint.path} is packed in version {declared.get('version')!r}; this release reads version {VERSION}"
            )
        found: dict[str, LayerSpec] = {}
        for linear, entry in dict(declared.get("layers") or {}).items():
            try:
                pattern = SparsityPattern.parse(str(entry["pattern"]))
                fmt = formats.get(str(entry["format"]))
            except (InputError, KeyError, TypeError) as error:
                raise CheckpointError(f"{checkpoint.path}/config.json describes {linear} wrongly: {error}") from None
            if not fmt.accepts(pattern):
                raise CheckpointError(
                    f"{checkpoint.path}/config.json gives {linear} pattern {pattern} in format {fmt.name}, which does not hold it"
                )
            shape = checkpoint.linear_shape(linear)
            values, dtype = checkpoint.spec(f"{linear}.values")
            found[linear] = LayerSpec(pattern, shape, dtype, math.prod(values))
        return found

    def read(self, checkpoint: Checkpoint, linear: str) -> PackedWeight:
        spec = checkpoint.packed_layers[linear]
        fmt = formats.get(spec.format)
        names = fmt.specs(spec.shape, spec.pattern, spec.dtype, spec.nnz)
        tensors = {name: checkpoint.tensor(f"{linear}.{name}") for name in names}
        return PackedWeight(fmt.name, fmt.version, spec.pattern, spec.shape, spec.dtype, tensors)

    def encode(self, linear: str, packed: PackedWeight) -> dict[str, Tensor]:
        return {f"{linear}.{name}": tensor for name, tensor in packed.tensors.items()}

    def config(self, config: dict[str, Any], layers: Mapping[str, LayerSpec]) -> dict[str, Any]:
        entries: dict[str, dict[str, Any]] = {}
        for linear, spec in layers.items():
            entries[linear] = {"format": spec.format, "pattern": str(spec.pattern)}
            if not spec.pattern.is_nm:
                entries[linear]["nnz"] = spec.nnz
        declared = {"quant_method": self.quant_method, "version": VERSION, "layers": entries}
        # Under another model_type a loader without this package refuses the checkpoint, where it would give an "opt" one random weights.
        return config | {"model_type": "sparse_opt", "architectures": ["SparseOPTForCausalLM"], "quantization_config": declared}


register(PackedStorage())
