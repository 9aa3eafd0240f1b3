"""What a model costs: parameters, non-zero ones, bytes of weights, and peak memory on the host and the device."""

from __future__ import annotations

import ctypes
import gc
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_engine.linear import SparseLinear

__all__ = ["MemoryMeter", "ModelSize", "model_size"]


@dataclass(frozen=True, slots=True)
class ModelSize:
    """``parameters`` of the dense architecture (tied ones once) with any adapters, the ``nonzero`` ones, and bytes held for weights."""

    parameters: int
    nonzero: int
    weight_nbytes: int


def model_size(model: nn.Module) -> ModelSize:
    """Count the weights of a dense, packed or quantised model, adapters included."""
    parameters = nonzero = nbytes = 0
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, SparseLinear):
            parameters += module.out_features * module.in_features
            nonzero += int(module.format.levels(module.packed).count_nonzero())
            nbytes += module.nbytes
        for _name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            nbytes += parameter.numel() * parameter.element_size()
            weight = _plain(module, parameter)
            parameters += weight.numel()
            nonzero += int(weight.count_nonzero())
    return ModelSize(parameters, nonzero, nbytes)


def _plain(module: nn.Module, parameter: Tensor) -> Tensor:
    """The weight that a parameter stands for: 4-bit ones hold two per byte."""
    if getattr(parameter, "quant_state", None) is None:
        return parameter.detach()
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(module)
    return weight.detach()


class MemoryMeter:
    """Peak memory in bytes since its making or last restart.

    ``device`` is as torch's allocator counts it, ``host`` above what the process held at the making. The host's peak is the kernel's own
    high-water mark, which is reset at the start; where that cannot be done it is None.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        # Freed blocks that the allocator has kept would hide memory that is taken now.
        ctypes.CDLL(None).malloc_trim(0) if hasattr(ctypes.CDLL(None), "malloc_trim") else None
        self._before = _status("VmRSS") or 0
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self.restart()

    def restart(self) -> None:
        """Forget peaks up to now: what is held still counts, what was held for a while does not."""
        self._resettable = _reset_high_water()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> dict[str, int | None]:
        host = _status("VmHWM") if self._resettable else None
        device = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None
        return {"peak_host_nbytes": None if host is None else max(0, host - self._before), "peak_device_nbytes": device}


def _reset_high_water() -> bool:
    try:
        # "5" resets the peak resident set size (proc(5), /proc/pid/clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found: Any = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
