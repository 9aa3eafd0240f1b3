"""Writes a trained model as a checkpoint: packed where it is masked, dense where it is not, whole by one rename."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparse_engine
from sparse_engine import formats, models
from sparse_engine.checkpoint import LayerSpec, storage
from sparse_engine.checkpoint.reader import MANIFEST
from sparse_engine.checkpoint.writer import ShardWriter, copy_side_files, publish, write_json
from sparse_engine.convert.job import manifest_entry
from sparse_engine.errors import SparseEngineError
from sparse_engine.mask import Mask

__all__ = ["write_checkpoint"]

_SHARD_BYTES = 4 << 30


def write_checkpoint(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    masks: Mapping[str, Mask],
    out: Path,
    *,
    side_files: Path,
    dtype: torch.dtype,
    output: str = "packed",
    made: Mapping[str, Any],
    beside: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> None:
    """Write weights to directory ``out``.

    Args:
        config: config.json of the dense model.
        state: its tensors by canonical name.
        masks: of the pruned linears; empty writes a dense checkpoint.
        side_files: directory whose tokenizer and generation settings go along.
        dtype: stored type of all weights.
        output: storage of the pruned linears, as of ``convert --format``.
        made: provenance for the manifest.
        beside: more JSON files by name, which appear together with the weights.

    Raises:
        InputError: ``out`` exists and ``overwrite`` is off, or a weight is not finite.
        SparseEngineError: a removed weight is not zero: the mask was lost.
    """
    family = models.for_config(dict(config))
    target = storage.get(output)
    result = out.with_name(out.name + ".new")
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir(parents=True)
    writer = ShardWriter(result, _SHARD_BYTES)
    layers: dict[str, LayerSpec] = {}
    recorded: dict[str, Any] = {}
    for name, tensor in state.items():
        linear = name.removesuffix(".weight")
        if family.drops(config, name):
            continue
        if linear not in masks or linear == name:
            writer.add(name, tensor.detach().to("cpu", dtype) if tensor.is_floating_point() else tensor.detach().cpu())
            continue
        weight, mask = tensor.detach().cpu(), masks[linear]
        if lost := int((weight != 0)[~mask.keep].sum()):
            raise SparseEngineError(f"{linear} has {lost} non-zero weights that its mask removes; nothing was written")
        packed = formats.for_pattern(mask.pattern).pack(weight.to(dtype), mask, linear)
        layers[linear] = LayerSpec.of(packed)
        recorded[linear] = manifest_entry(packed)
        for full, part in target.encode(linear, packed).items():
            writer.add(full, part)
    writer.finish()
    dense = family.dense_config(config) | {"dtype": str(dtype).removeprefix("torch.")}
    write_json(result / "config.json", target.config(dense, layers) if layers else dense)
    copy_side_files(side_files, result)
    if layers:
        manifest = {"version": 1, "sparse_engine": sparse_engine.__version__, "made": dict(made), "layers": recorded}
        write_json(result / MANIFEST, manifest)
    for name, content in (beside or {}).items():
        write_json(result / name, dict(content))
    publish(result, out, overwrite=overwrite)
