"""The portable GPU product: a Triton kernel (kernels/bitmask.py) over the packed tensors as they are, for up to 16 activation rows.

It runs what the CUDA kernels do not: fp32, every N:M, and GPUs without CUDA's run-time compiler.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from sparse_engine.errors import InputError, KernelUnavailableError
from sparse_engine.formats.base import VALUE_DTYPES
from sparse_engine.ops import define_linear
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Kernel, Layout, Problem, register

_MODULE = "sparse_engine.kernels.bitmask"
_MAX_ROWS = 16


@cache
def _why_unavailable() -> str | None:
    """Why the Triton kernel cannot be imported, as a phrase that can follow its name; looks for the modules without running them."""
    if find_spec("triton") is None:
        return "needs triton, which is not installed (pip install 'sparse-engine[gpu]')"
    try:
        found = find_spec(_MODULE)
    except ModuleNotFoundError:
        found = None
    if found is None:
        return f"needs {_MODULE}, which only an installed sparse-engine has (pip install .)"
    return None


@cache
def _launcher() -> Callable[..., Tensor]:
    """``bitmask_linear`` of the kernel's module; importing Triton takes a while, so this waits for the first product."""
    if reason := _why_unavailable():
        raise KernelUnavailableError(f"triton_bitmask {reason}")
    launcher: Callable[..., Tensor] = importlib.import_module(_MODULE).bitmask_linear
    return launcher


def _check(x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor | None, bias: Tensor | None, n: int, m: int) -> None:
    rows, columns = bitmask.shape[0], x.shape[-1]
    if x.dtype != values.dtype or (bias is not None and bias.dtype != values.dtype):
        given = f"x is {x.dtype}" if bias is None else f"x is {x.dtype} and the bias {bias.dtype}"
        raise InputError(f"the packed weight is {values.dtype} but {given}: convert them to one type")
    parts = {"values": values, "bitmask": bitmask, "row_offsets": row_offsets, "bias": bias}
    for name, tensor in parts.items():
        if tensor is not None and tensor.device != x.device:
            raise InputError(f"x is on {x.device} but {name} is on {tensor.device}: move them to one device")
    stored_fit = values.numel() * m == rows * columns * n if row_offsets is None else row_offsets.shape == (rows + 1,)
    if bitmask.shape[1] != -(-columns // 8) or not stored_fit:
        raise InputError(f"x has {columns} columns, which does not fit a packed weight with a bitmask of {tuple(bitmask.shape)}")
    if bias is not None and bias.shape != (rows,):
        raise InputError(f"the bias has shape {tuple(bias.shape)}, expected ({rows},) for a packed weight of {rows} rows")
    if (given_rows := x.shape[:-1].numel()) > _MAX_ROWS:
        raise InputError(f"triton_bitmask takes at most {_MAX_ROWS} activation rows, got {given_rows}")


def _linear(x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor | None, bias: Tensor | None, n: int, m: int) -> Tensor:
    _check(x, values, bitmask, row_offsets, bias, n, m)
    y = x.new_empty((*x.shape[:-1], bitmask.shape[0]))
    if y.numel() == 0:
        return y
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    contiguous = [t if t is None else t.contiguous() for t in (values, bitmask, row_offsets, bias)]
    launch = _launcher()
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device(x.device):
        launch(flat, *contiguous, n, m, y.view(-1, y.shape[-1]))
    return y


_op = define_linear("triton_bitmask_linear", _linear, ("CUDA",))


class TritonBitmaskKernel(Kernel):
    name = "triton_bitmask"
    formats: ClassVar[frozenset[str]] = frozenset({"nm", "unstructured"})
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset(VALUE_DTYPES)

    def unsupported(self, problem: Problem) -> str | None:
        if problem.rows > _MAX_ROWS:
            return f"takes at most {_MAX_ROWS} activation rows, not {problem.rows}"
        return _why_unavailable()

    def cost(self, problem: Problem) -> float:
        # Not measured on a GPU yet. Set so that every measured kernel goes first and only the reference, which unpacks the
        # weight at each call, comes after: a slow launch, and the weights at a small part of any GPU's bandwidth.
        return 100.0 + problem.packed_nbytes * 1e-5 * (1 + problem.rows / 4)

    def run(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern) -> Tensor:
        return _op(x, layout["values"], layout["bitmask"], layout.get("row_offsets"), bias, pattern.n or 0, pattern.m or 0)


register(TritonBitmaskKernel())
