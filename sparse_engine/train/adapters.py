"""Adapters on a model: put on for training, and loaded again from the directory that training wrote."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparse_engine.checkpoint import Checkpoint, resolve
from sparse_engine.errors import CheckpointError, InputError
from sparse_engine.mask import Mask
from sparse_engine.train.base import load_dense, load_quantised, masks_of
from sparse_engine.train.settings import FinetuneSettings

__all__ = ["RECORD", "Adapter", "add_adapters", "is_adapter", "load_adapter"]

_CONFIG = "adapter_config.json"
RECORD = "finetune.json"
"""Settings, losses and cost of a fine-tuning run, beside the weights that it wrote."""


def is_adapter(path: Path) -> bool:
    """Whether ``path`` is a directory that an adapter method of ``finetune`` wrote."""
    return (path / _CONFIG).is_file()


def add_adapters(model: Any, masks: Mapping[str, Mask], settings: FinetuneSettings) -> Any:
    """``model`` with fresh adapters on its target linears, and everything else frozen; under ``masks`` where there are any.

    Raises:
        InputError: peft is not installed.
    """
    peft = _peft()
    if settings.bits:
        # Layer norms in fp32 and inputs that carry gradients past the frozen quantised layers.
        with _quiet():
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    if masks:
        from sparse_engine.train.masked_lora import attach_masks, register_masked

        attach_masks(model, masks)
        register_masked(config, model)
    with _quiet():
        return peft.get_peft_model(model, config)


class Adapter:
    """An adapter directory, read: its method, its base and how that was quantised.

    Args:
        base: replaces the base that the directory names, for one that was moved.

    Raises:
        CheckpointError: the directory is not one that ``finetune`` wrote, or its base is not there.
    """

    def __init__(self, path: Path, base: str | None = None) -> None:
        self.path = path
        try:
            record = json.loads((path / RECORD).read_text(encoding="utf-8"))
            self.settings = FinetuneSettings.from_dict(record["settings"])
            named = str(record["base"])
        except (OSError, ValueError, KeyError, InputError) as error:
            raise CheckpointError(f"{path} is no adapter that `sparse-engine finetune` wrote ({RECORD}: {error})") from None
        if not (path / "adapter_model.safetensors").is_file():
            raise CheckpointError(f"{path}/adapter_model.safetensors is missing; adapters are read from safetensors alone")
        try:
            self.base = resolve(base or named)
        except CheckpointError as error:
            raise CheckpointError(f"{path} needs its base model: {error}; name where it is with --base") from None
        self.masks = masks_of(Checkpoint(self.base))


def load_adapter(adapter: Adapter, device: torch.device, *, packed: bool = False, dtype: torch.dtype | None = None) -> Any:
    """The adapter on its base, quantised as it was in training, in evaluation mode.

    Args:
        packed: run an unquantised pruned base packed, with the adapter beside it.
        dtype: of an unquantised base; default fp32.
    """
    peft = _peft()
    settings = adapter.settings
    if settings.bits:
        model = load_quantised(adapter.base, settings.bits, device)
    elif packed and Checkpoint(adapter.base).kind != "dense":
        from sparse_engine.hf import SparseOPTForCausalLM

        model = SparseOPTForCausalLM.from_pretrained(adapter.base, dtype=dtype or torch.float32).to(device)
    else:
        model = load_dense(adapter.base, dtype or torch.float32).to(device)
    config = peft.LoraConfig.from_pretrained(adapter.path)
    config.inference_mode = True
    if settings.method == "sparse-lora":
        from sparse_engine.train.masked_lora import attach_masks, register_masked

        attach_masks(model, adapter.masks)
        register_masked(config, model)
    with _quiet():
        return peft.PeftModel.from_pretrained(model, adapter.path, config=config).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides peft's notices of its own deprecated calls, and of packed layers, which MaskedLora is made for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message="Unsupported layer type.*SparseLinear.*")
        yield


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError:
        raise InputError("adapters need the peft package: pip install 'sparse-engine[train]'") from None
    return peft
