"""The layer-sequential pruning loop of SparseGPT and Wanda: each layer is pruned from the outputs of pruned layers.

Per layer: one pass gathers the statistics of its linears' inputs, all of them are pruned, and a second pass with the pruned
weights makes the next layer's inputs (Frantar & Alistarh 2023, section 4; Sun et al. 2024, section 3). Only one decoder
layer is on the compute device at a time; the hidden states of the calibration samples are the rest of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from sparse_engine import formats
from sparse_engine.calibrate import Statistics, statistics_for
from sparse_engine.checkpoint.reader import Checkpoint
from sparse_engine.convert.job import Job
from sparse_engine.errors import CheckpointError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.pattern import SparsityPattern
from sparse_engine.pruners.base import Needs, Pruner

__all__ = ["prune_layers"]


def prune_layers(
    source: Checkpoint,
    job: Job,
    *,
    done: int,
    pattern: SparsityPattern,
    pruner: Pruner,
    calibration: Sequence[Tensor],
    device: torch.device,
    dtype: torch.dtype,
    value_type: str,
) -> Iterator[int]:
    """Prune and pack every layer from ``done`` on into ``job``, yielding each layer's index once it is stored.

    Args:
        calibration: token ids int64 (T,) per sample; may be empty for a pruner that needs no statistics.
        device: where one layer at a time is computed.
        dtype: type of the packed weights. Computation is in float32 on a CPU and in the checkpoint's type on a GPU.
        value_type: how their values are stored; later layers see what quantised ones stand for.

    Raises:
        InputError: a weight is not finite.
        CheckpointError: a tensor is missing or of another shape than the config says.
    """
    family, config = source.family, source.config
    gathers = pruner.needs is not Needs.NOTHING
    compute = torch.float32 if device.type == "cpu" else source.spec(f"{family.linears(config)[0]}.weight")[1]
    hidden = _embed(source, calibration, device, compute) if gathers else []
    count = family.layer_count(config)
    for index in range(count):
        if index < done and not gathers:
            yield index
            continue
        prefix = family.layer_prefix(index)
        layer = _load_layer(source, index, compute, device)
        if index < done:
            for full, stored in job.load(index).items():
                _set_weight(layer, full.removeprefix(f"{prefix}."), stored)
        else:
            packed = _prune_layer(source, layer, index, hidden, pruner, pattern, dtype, value_type)
            job.save(index, packed)
        if gathers and index + 1 < count:
            hidden = [_advance(source, layer, state, device) for state in hidden]
        # Otherwise this layer would stay in memory while the next one is built.
        del layer
        yield index


def _embed(source: Checkpoint, calibration: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    embedding = source.family.embed(source.config, source.tensor, dtype=dtype, device=device)
    with torch.inference_mode():
        return [embedding(ids.to(device)[None]).cpu() for ids in calibration]


def _load_layer(source: Checkpoint, index: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    layer = source.family.build_layer(source.config, index, dtype=dtype, device=device)
    prefix = source.family.layer_prefix(index)
    for name, target in layer.state_dict().items():
        full = f"{prefix}.{name}"
        if source.spec(full)[0] != tuple(target.shape):
            raise CheckpointError(f"{source.path}: {full} is {source.spec(full)[0]}, where the config gives {tuple(target.shape)}")
        target.copy_(source.tensor(full))
    return layer


def _prune_layer(
    source: Checkpoint,
    layer: nn.Module,
    index: int,
    hidden: list[Tensor],
    pruner: Pruner,
    pattern: SparsityPattern,
    dtype: torch.dtype,
    value_type: str,
) -> dict[str, PackedWeight]:
    """Prune all linears of ``layer``, which holds the new weights afterwards; the statistics are gone on return."""
    prefix = source.family.layer_prefix(index)
    statistics = {} if pruner.needs is Needs.NOTHING else _gather(source, layer, prefix, hidden, pruner.needs)
    packed: dict[str, PackedWeight] = {}
    for name in (name for group in source.family.linear_groups for name in group):
        full = f"{prefix}.{name}"
        new, mask = pruner.prune(_linear(layer, name).weight.detach(), statistics.get(name), pattern, layer=full)
        packed[full] = formats.for_pattern(pattern).pack(new.to(dtype), mask, full, value_type).to("cpu")
        _set_weight(layer, name, packed[full])
    return packed


def _gather(source: Checkpoint, layer: nn.Module, prefix: str, hidden: list[Tensor], needs: Needs) -> dict[str, Statistics]:
    statistics: dict[str, Statistics] = {}
    hooks = []
    device = next(layer.parameters()).device
    for group in source.family.linear_groups:
        first = _linear(layer, group[0])
        shared = statistics_for(needs, first.in_features, device, name=f"{prefix}.{group[0]}")
        statistics.update(dict.fromkeys(group, shared))
        hooks.append(first.register_forward_pre_hook(lambda _module, inputs, shared=shared: shared.update(inputs[0])))
    try:
        for state in hidden:
            _advance(source, layer, state, device)
    finally:
        for hook in hooks:
            hook.remove()
    return statistics


def _advance(source: Checkpoint, layer: nn.Module, state: Tensor, device: torch.device) -> Tensor:
    with torch.inference_mode():
        return source.family.run_layer(layer, state.to(device)).cpu()


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    module = layer.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not a linear layer")
    return module


def _set_weight(layer: nn.Module, name: str, packed: PackedWeight) -> None:
    # From the packed form, so that a resumed run continues from the very weights that an uninterrupted one used.
    with torch.no_grad():
        _linear(layer, name).weight.copy_(formats.get(packed.format).unpack(packed))
