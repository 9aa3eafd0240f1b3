"""The native CPU kernels: packed weights read in place, expanded in registers (few rows) or in cache-sized tiles (many)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_engine import native
from sparse_engine.errors import InputError
from sparse_engine.formats.base import VALUE_DTYPES, PackedWeight
from sparse_engine.ops import define_linear
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Kernel, Layout, Problem, register
from sparse_engine.value_types import PLAIN

REGISTER_ROWS = 24
"""Up to this many activation rows the library multiplies at every instruction-set level; above, a BLAS product over expanded tiles is
faster where the library has no kernel for many rows (on AVX2 the two cross between 16 and 32 rows at every OPT shape tried)."""

MANY_ROWS = frozenset({"avx512"})
"""Levels that have one."""

TILE_BYTES = 1 << 20
"""Size of one expanded tile: small enough to be still in cache when the product reads it."""


_ARGUMENTS = "Tensor x, Tensor values, Tensor bitmask, Tensor? row_offsets, Tensor? scales, Tensor? bias, int n, int m"


def _check(
    x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor | None, scales: Tensor | None, bias: Tensor | None, n: int, m: int
) -> None:
    rows, columns = bitmask.shape[0], x.shape[-1]
    dtype = values.dtype if scales is None else x.dtype
    if x.dtype != dtype or (bias is not None and bias.dtype != dtype):
        given = f"x is {x.dtype}" if bias is None else f"x is {x.dtype} and the bias {bias.dtype}"
        if scales is not None:
            raise InputError(f"{given}: convert them to one type")
        raise InputError(f"the packed weight is {dtype} but {given}: convert them to one type")
    fits = bitmask.shape[1] == -(-columns // 8)
    if row_offsets is None:
        kept = columns // m * n
        per_row = kept if values.dtype is not torch.uint8 else -(-kept // 2)
        fits = fits and columns % m == 0 and values.numel() == rows * per_row
    if not fits:
        raise InputError(f"x has {columns} columns, which does not fit a packed weight with a bitmask of {tuple(bitmask.shape)}")
    if bias is not None and bias.shape != (rows,):
        raise InputError(f"the bias has shape {tuple(bias.shape)}, expected ({rows},) for a packed weight of {rows} rows")


def _tiles(
    values: Tensor, bitmask: Tensor, row_offsets: Tensor | None, scales: Tensor | None, n: int, m: int, columns: int, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor]]:
    """(begin, end, dense rows begin .. end - 1 in ``dtype``) over all rows; each tile is overwritten by the next."""
    rows = bitmask.shape[0]
    step = max(1, min(rows, TILE_BYTES // max(1, columns * dtype.itemsize)))
    scratch = torch.empty(step, columns, dtype=dtype)
    threads = torch.get_num_threads()
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        tile = scratch[: end - begin]
        native.expand_tile(values, scales, bitmask, row_offsets, n, m, columns, begin, end, tile, threads)
        yield begin, end, tile


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    # Without AMX a dense fp32 product is the faster one, so 16-bit weights are expanded straight to fp32.
    return dtype if dtype is torch.bfloat16 and native.has_amx_bf16() else torch.float32


def _linear(
    x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor | None, scales: Tensor | None, bias: Tensor | None, n: int, m: int
) -> Tensor:
    _check(x, values, bitmask, row_offsets, scales, bias, n, m)
    rows, columns = bitmask.shape[0], x.shape[-1]
    out = x.new_empty((*x.shape[:-1], rows))
    values, bitmask = values.contiguous(), bitmask.contiguous()
    if out.numel() <= REGISTER_ROWS * rows or native.isa() in MANY_ROWS:
        bias = None if bias is None else bias.contiguous()
        native.linear(x.contiguous(), values, scales, bitmask, row_offsets, bias, n, m, out, torch.get_num_threads())
        return out
    dtype = _compute_dtype(x.dtype)
    dense_x, flat = x.reshape(-1, columns).to(dtype), out.view(-1, rows)
    dense_bias = None if bias is None else bias.to(dtype)
    for begin, end, tile in _tiles(values, bitmask, row_offsets, scales, n, m, columns, dtype):
        target = flat[:, begin:end] if dtype == x.dtype else dense_x.new_empty(flat.shape[0], end - begin)
        if dense_bias is None:
            torch.mm(dense_x, tile.t(), out=target)
        else:
            torch.addmm(dense_bias[begin:end], dense_x, tile.t(), out=target)
        if dtype != x.dtype:
            flat[:, begin:end] = target
    return out


def _fake(x: Tensor, values: Tensor, bitmask: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], bitmask.shape[0]))


_op = define_linear("cpu_linear", _linear, ("CPU",), arguments=_ARGUMENTS, fake=_fake)


def _gradient(
    gradient: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor | None, scales: Tensor | None, n: int, m: int, columns: int
) -> Tensor:
    """Gradient (..., rows) by W (rows, columns), summed in fp32 over tiles of W's rows: x's gradient (..., columns)."""
    flat = gradient.reshape(-1, bitmask.shape[0])
    total = torch.zeros(flat.shape[0], columns)
    for begin, end, tile in _tiles(values, bitmask, row_offsets, scales, n, m, columns, torch.float32):
        total.addmm_(flat[:, begin:end].float(), tile)
    return total.to(gradient.dtype).view(*gradient.shape[:-1], columns)


# An operator of its own, since a compiled model with gradients is traced through its backward pass too.
_gradient_op = define_linear(
    "cpu_linear_gradient",
    _gradient,
    ("CPU",),
    arguments="Tensor gradient, Tensor values, Tensor bitmask, Tensor? row_offsets, Tensor? scales, int n, int m, int columns",
    fake=lambda gradient, *others: gradient.new_empty((*gradient.shape[:-1], others[-1])),
)


def _is_plain(x: Tensor) -> bool:
    """Whether nothing watches or transforms this call, so that the dispatcher (5 µs of a small layer's time) can be passed by."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class _Differentiable(torch.autograd.Function):
    """The product with gradients for x and the bias; the packed weight is constant."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bitmask: Tensor,
        row_offsets: Tensor | None,
        scales: Tensor | None,
        bias: Tensor | None,
        n: int,
        m: int,
    ) -> Tensor:
        ctx.save_for_backward(values, bitmask, row_offsets, scales)
        ctx.columns, ctx.n, ctx.m = x.shape[-1], n, m
        return _op(x, values, bitmask, row_offsets, scales, bias, n, m)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        values, bitmask, row_offsets, scales = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _gradient_op(gradient, values, bitmask, row_offsets, scales, ctx.n, ctx.m, ctx.columns)
        if ctx.needs_input_grad[5]:
            grad_bias = gradient.reshape(-1, bitmask.shape[0]).sum(0)
        return grad_x, None, None, None, None, grad_bias, None, None


class CPUKernel(Kernel):
    """AVX-512, AVX2 or portable C++, whichever the processor has; see ``csrc/include/sparse_engine.h``."""

    name = "cpu"
    formats: ClassVar[frozenset[str]] = frozenset({"nm", "unstructured"})
    devices: ClassVar[frozenset[str]] = frozenset({"cpu"})
    value_types: ClassVar[frozenset[str]] = frozenset({PLAIN, "int8", "int4"})
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset(VALUE_DTYPES)

    def unsupported(self, problem: Problem) -> str | None:
        return native.available()

    def cost(self, problem: Problem) -> float:
        # Some 10 bytes of memory traffic and 10 multiply-adds per ns: the memory binds for few rows, the sums for many.
        memory = problem.packed_nbytes * 1e-4
        sums = problem.rows * problem.out_features * problem.in_features * 1e-5
        return 5.0 + max(memory, sums)

    def prepare(self, packed: PackedWeight) -> Layout:
        for tensor in packed.tensors.values():
            native.advise_huge_pages(tensor)
            if native.memory_nodes() > 1:
                native.touch(tensor, torch.get_num_threads())
        return packed.tensors

    def run(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern) -> Tensor:
        packed = (layout["values"], layout["bitmask"], layout.get("row_offsets"), layout.get("scales"))
        arguments = (x, *packed, bias, pattern.n or 0, pattern.m or 0)
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            result: Tensor = _Differentiable.apply(*arguments)  # type: ignore[no-untyped-call]
            return result
        return _linear(*arguments) if _is_plain(x) else _op(*arguments)


register(CPUKernel())
