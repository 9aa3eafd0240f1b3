"""What the launchers of this folder share: element types, checks of arguments and the launch itself."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparse_engine import cuda
from sparse_engine.backends.cuda_decode import Gpu, gpu
from sparse_engine.errors import InputError

__all__ = ["ELEMENT", "Gpu", "check", "gpu", "run"]

ELEMENT = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
"""Values of the macro ELEMENT of csrc/cuda/element.cuh."""


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a tensor that a kernel could not read as it stands.

    Raises:
        InputError: it has another shape, type or device, or is not contiguous.
    """
    if tensor.shape != shape or tensor.dtype is not dtype or tensor.device != device or not tensor.is_contiguous():
        kind = "" if tensor.is_contiguous() else " with gaps"
        raise InputError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}{kind} on {tensor.device}, expected contiguous {dtype} {shape} on {device}"
        )


def run(
    source: str,
    function: str,
    macros: dict[str, int],
    grid: tuple[int, int],
    threads: int,
    argument: ctypes.Structure,
    device: torch.device,
    *,
    cluster: int = 1,
    shared_bytes: int = 0,
    cooperative: bool = False,
) -> None:
    """Launch ``function`` of csrc/cuda/``source`` on the current stream of ``device``; ``cluster`` groups that many blocks along y.

    ``cooperative``: all blocks are resident at once, and none starts before the stream's earlier kernels have ended.

    Raises:
        KernelUnavailableError: it cannot be compiled or launched.
    """
    index = device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            options = {"cluster": cluster, "shared_bytes": shared_bytes, "cooperative": cooperative}
            return run(source, function, macros, grid, threads, argument, device, **options)  # type: ignore[arg-type]
    here = gpu(index)
    loaded = cuda.load(source, function, here.arch, tuple(sorted(macros.items())))
    cuda.launch(
        loaded,
        grid,
        threads,
        shared_bytes,
        argument,
        index,
        cluster=(1, cluster),
        overlap=here.hopper and not cooperative,
        cooperative=cooperative,
    )
    return None
