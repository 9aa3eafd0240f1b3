"""This project's own storage: the packed format's tensors as they are, and each linear's pattern in config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_engine import formats, value_types
from sparse_engine.checkpoint.storage import register
from sparse_engine.checkpoint.storage.base import LayerSpec, Storage
from sparse_engine.errors import CheckpointError, InputError
from sparse_engine.formats.base import VALUE_DTYPES, PackedWeight
from sparse_engine.pattern import SparsityPattern
from sparse_engine.value_types import PLAIN

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
                value_type = str(entry.get("values", PLAIN))
                value_types.get(value_type)
            except (InputError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{checkpoint.path}/config.json describes {linear} wrongly: {error}") from None
            if not fmt.accepts(pattern):
                raise CheckpointError(
                    f"{checkpoint.path}/config.json gives {linear} pattern {pattern} in format {fmt.name}, which does not hold it"
                )
            kind = value_types.get(value_type)
            shape = checkpoint.linear_shape(linear)
            values, element = checkpoint.spec(f"{linear}.values")
            dtype = element if value_type == PLAIN else _declared_dtype(checkpoint, linear, entry)
            found[linear] = LayerSpec(pattern, shape, dtype, math.prod(values) * kind.slots, value_type)
        return found

    def read(self, checkpoint: Checkpoint, linear: str) -> PackedWeight:
        spec = checkpoint.packed_layers[linear]
        fmt = formats.get(spec.format)
        names = fmt.specs(spec.shape, spec.pattern, spec.dtype, spec.nnz, spec.value_type)
        tensors = {name: checkpoint.tensor(f"{linear}.{name}") for name in names}
        return PackedWeight(fmt.name, fmt.version, spec.pattern, spec.shape, spec.dtype, tensors, spec.value_type)

    def encode(self, linear: str, packed: PackedWeight) -> dict[str, Tensor]:
        return {f"{linear}.{name}": tensor for name, tensor in packed.tensors.items()}

    def config(self, config: dict[str, Any], layers: Mapping[str, LayerSpec]) -> dict[str, Any]:
        entries = {linear: layer_entry(spec) for linear, spec in layers.items()}
        declared = {"quant_method": self.quant_method, "version": VERSION, "layers": entries}
        # Under another model_type a loader without this package refuses the checkpoint, where it would give an "opt" one random weights.
        return config | {"model_type": "sparse_opt", "architectures": ["SparseOPTForCausalLM"], "quantization_config": declared}


def layer_entry(spec: LayerSpec) -> dict[str, Any]:
    """What config.json says of one packed linear: only what its tensors and its pattern do not."""
    entry: dict[str, Any] = {"format": spec.format, "pattern": str(spec.pattern)}
    if not spec.pattern.is_nm:
        entry["nnz"] = spec.nnz
    if spec.value_type != PLAIN:
        entry |= {"values": spec.value_type, "dtype": str(spec.dtype).removeprefix("torch.")}
    return entry


def _declared_dtype(checkpoint: Checkpoint, linear: str, entry: Mapping[str, Any]) -> torch.dtype:
    """The type of the weight that quantised values stand for."""
    names = {str(dtype).removeprefix("torch."): dtype for dtype in VALUE_DTYPES}
    if entry.get("dtype") not in names:
        raise CheckpointError(
            f"{checkpoint.path}/config.json gives the quantised {linear} dtype {entry.get('dtype')!r}; it is one of {', '.join(names)}"
        )
    return names[entry["dtype"]]


register(PackedStorage())
