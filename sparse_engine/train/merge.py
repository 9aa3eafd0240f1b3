"""``merge``: an adapter and its base become one checkpoint; a merge that would fill the zeros of a pruned base is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_engine.checkpoint import Checkpoint
from sparse_engine.checkpoint.writer import check_target
from sparse_engine.errors import InputError
from sparse_engine.mask import Mask
from sparse_engine.train.adapters import Adapter, is_adapter, load_adapter
from sparse_engine.train.save import write_checkpoint

__all__ = ["MergeReport", "merge"]


@dataclass(frozen=True, slots=True)
class MergeReport:
    """``dropped``: share of the adapter's update, by its norm over all layers, that lay outside the mask and was left out."""

    out: Path
    merged_layers: int
    masked_layers: int
    dropped: float


def merge(
    source: Path,
    out: Path,
    *,
    base: str | None = None,
    apply_mask: bool = False,
    output: str = "packed",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Write base + adapter as one checkpoint: packed under the base's mask, or dense for a dense base.

    The update is added to the weights that it was trained on: for a quantised base to the dequantised ones, so that the merged
    model is the trained one up to rounding. Both kinds of quantisation keep zeros, so a mask outlives them.

    Args:
        base: where the base is, if not where training found it.
        apply_mask: for an adapter trained without the mask: drop what lies outside of it instead of refusing.
        dtype: stored type; default: the base's.

    Raises:
        InputError: the merge would lose the mask, ``source`` is no adapter, or ``out`` exists or must not be replaced.
    """
    check_target(out, overwrite=overwrite)
    if not is_adapter(source):
        raise InputError(f"{source} is no adapter: `merge` takes what `finetune --method qlora` or `sparse-lora` wrote")
    adapter = Adapter(source, base)
    check_target(out, overwrite=overwrite, reads=[source, adapter.base])
    masks = adapter.masks
    if masks and adapter.settings.method != "sparse-lora" and not apply_mask:
        raise InputError(
            f"merging {source} would fill the zeros of its pruned base {adapter.base}: train it with --method sparse-lora, "
            "which merges exactly, or pass --apply-mask to drop the part of the update that the mask removes"
        )
    checkpoint = Checkpoint(adapter.base)
    model = load_adapter(adapter, torch.device("cpu"))
    state, kept, lost = _merged(model, masks)
    first = checkpoint.family.linears(checkpoint.config)[0]
    stored = checkpoint.packed_layers[first].dtype if first in checkpoint.packed_layers else checkpoint.spec(f"{first}.weight")[1]
    source_made = (checkpoint.manifest or {}).get("made", {})
    write_checkpoint(
        checkpoint.config,
        state,
        masks,
        out,
        side_files=adapter.base,
        dtype=dtype or stored,
        output=output,
        made=source_made | {"finetuned": adapter.settings.method},
        overwrite=overwrite,
    )
    total = kept + lost
    return MergeReport(out, sum(1 for _ in _adapted(model)), len(masks), math.sqrt(lost / total) if total else 0.0)


def _adapted(model: Any) -> Any:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer))


def _merged(model: Any, masks: dict[str, Mask]) -> tuple[dict[str, Tensor], float, float]:
    """Merged dense tensors by canonical name, and the update's squared norm inside and outside the masks."""
    from peft.utils.integrations import dequantize_module_weight

    plain = model.get_base_model()
    layers = dict(_adapted(model))
    state: dict[str, Tensor] = {}
    kept = lost = 0.0
    for name, module in plain.named_modules():
        if any(name.startswith(f"{layer}.") for layer in layers):
            continue
        if name in layers:
            base = module.get_base_layer()
            weight = dequantize_module_weight(base).detach().float()
            delta = module.get_delta_weight("default").detach().float()
            if name in masks:
                keep = masks[name].keep
                inside = delta * keep
                kept, lost = kept + float(inside.square().sum()), lost + float((delta - inside).square().sum())
                delta = inside
            state[f"{name}.weight"] = weight + delta
            module = base
        elif _is_quantised(module):
            state[f"{name}.weight"] = dequantize_module_weight(module).detach().float()
        for part, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if f"{name}.{part}" not in state and part in ("weight", "bias"):
                state[f"{name}.{part}"] = tensor.detach().float()
    return state, kept, lost


def _is_quantised(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_floating_point()
