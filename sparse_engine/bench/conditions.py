"""Power and clock of a GPU while it is measured, and the limit that its tensor cores have at their highest clock: all from NVML."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from sparse_engine import value_types
from sparse_engine.pattern import SparsityPattern
from sparse_engine.value_types import PLAIN

__all__ = ["describe", "sample", "summary", "tensor_limit_us"]

_SM_CLOCK = 1  # NVML_CLOCK_SM
_POWER_INSTANT = 186  # NVML_FI_DEV_POWER_INSTANT
_SAMPLE_SECONDS = 0.01

_FLOPS_PER_CLOCK = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192}
"""Of a multiprocessor's dense tensor cores on 16-bit values with fp32 sums, by compute capability (NVIDIA's architecture papers; the
chips left out have several rates under one capability)."""


class _FieldValue(ctypes.Structure):
    """``nvmlFieldValue_t``; the value is read as an unsigned int."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("field", "scope")),
        *((name, ctypes.c_longlong) for name in ("timestamp", "latency_us")),
        *((name, ctypes.c_uint) for name in ("type", "status")),
        ("value", ctypes.c_uint * 2),
    )


class _Nvml:
    def __init__(self, library: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self._library, self._handle = library, handle

    def _number(self, function: str, *before: int) -> int | None:
        found = ctypes.c_uint()
        status = getattr(self._library, function)(self._handle, *before, ctypes.byref(found))
        return found.value if status == 0 else None

    def power_w(self) -> float | None:
        """Now, or over the last second where the driver knows no more."""
        field = _FieldValue(field=_POWER_INSTANT)
        status = self._library.nvmlDeviceGetFieldValues(self._handle, 1, ctypes.byref(field))
        milliwatts = field.value[0] if status == 0 and field.status == 0 else self._number("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1e3

    def power_limit_w(self) -> float | None:
        milliwatts = self._number("nvmlDeviceGetEnforcedPowerLimit")
        return None if milliwatts is None else milliwatts / 1e3

    def sm_mhz(self) -> int | None:
        return self._number("nvmlDeviceGetClockInfo", _SM_CLOCK)

    def most_sm_mhz(self) -> int | None:
        return self._number("nvmlDeviceGetMaxClockInfo", _SM_CLOCK)


@cache
def _nvml(index: int) -> _Nvml | None:
    """NVML's view of CUDA device ``index``, or None where the library or the device cannot be found."""
    try:
        library = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
        uuid = str(torch.cuda.get_device_properties(index).uuid)
    except (OSError, AttributeError):
        return None
    handle = ctypes.c_void_p()
    name = f"GPU-{uuid.removeprefix('GPU-')}".encode()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        return None
    return _Nvml(library, handle)


def _of(device: torch.device) -> _Nvml | None:
    if device.type != "cuda":
        return None
    return _nvml(torch.cuda.current_device() if device.index is None else device.index)


def sample(device: torch.device, start: Callable[[], None], us: float) -> dict[str, float | None]:
    """``power_w`` and ``sm_mhz`` while work of ``us`` microseconds that ``start`` launches goes on, None where NVML does not tell."""
    if (nvml := _of(device)) is None:
        return {"power_w": None, "sm_mhz": None}
    for _ in range(max(2, int(_SAMPLE_SECONDS * 1e6 / us))):
        start()
    time.sleep(_SAMPLE_SECONDS / 2)
    found = {"power_w": nvml.power_w(), "sm_mhz": nvml.sm_mhz()}
    torch.cuda.synchronize(device)
    return found


def describe(device: torch.device) -> dict[str, float | None]:
    """The power and clock that the device may not exceed."""
    nvml = _of(device)
    return {"power_limit_w": nvml.power_limit_w() if nvml else None, "max_sm_mhz": nvml.most_sm_mhz() if nvml else None}


def summary(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Least, median and most of what :func:`sample` found beside each row."""
    found = {}
    for name in ("power_w", "sm_mhz"):
        if values := sorted(row[name] for row in rows if row.get(name) is not None):
            found[name] = [values[0], values[len(values) // 2], values[-1]]
    return found


def tensor_limit_us(
    device: torch.device, pattern: SparsityPattern, dtype: torch.dtype, n: int, k: int, m: int, value_type: str = PLAIN
) -> float | None:
    """The time of the multiply-adds on tensor cores at their highest clock, which know 2:4 alone; None where the rate is not known.

    Values of eight bits have twice the rate of 16-bit ones.
    """
    nvml = _of(device)
    if nvml is None or dtype.itemsize != 2 or (mhz := nvml.most_sm_mhz()) is None:
        return None
    if (rate := _FLOPS_PER_CLOCK.get(torch.cuda.get_device_capability(device))) is None:
        return None
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    for doubles in (pattern == SparsityPattern.nm(2, 4), value_types.get(value_type).bits == 8):
        rate *= 2 if doubles else 1
    return 2.0 * m * n * k / (rate * processors * mhz)
