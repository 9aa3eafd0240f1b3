"""The portable GPU product: Triton kernels (kernels/bitmask.py) over the packed tensors as they are, for any number of activation rows.

They run what the CUDA kernels do not: fp32, every N:M, and GPUs without CUDA's run-time compiler.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine import tuning
from sparse_engine.errors import InputError, KernelUnavailableError
from sparse_engine.formats.base import VALUE_DTYPES, PackedWeight
from sparse_engine.ops import define_linear
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Config, Kernel, Layout, Problem, register

_MODULE = "sparse_engine.kernels.bitmask"
_CHUNK_BYTES = 64


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
def _kernels() -> ModuleType:
    """The kernels' module; importing Triton takes a while, so this waits for the first product."""
    if reason := _why_unavailable():
        raise KernelUnavailableError(f"triton_bitmask {reason}")
    return importlib.import_module(_MODULE)


def chunk_starts(bitmask: Tensor) -> Tensor:
    """Values of a row before each 64th mask byte, int32 (rows, ceil(bytes / 64)), of a uint8 (rows, bytes) bitmask.

    With it a program can begin inside an unstructured row; 4 bytes for every 64 mask bytes and their values, under 1 % at half density.
    """
    count = bitmask - ((bitmask >> 1) & 0x55)
    count = (count & 0x33) + ((count >> 2) & 0x33)
    count = (count + (count >> 4)) & 0x0F
    padded = F.pad(count, (0, -count.shape[1] % _CHUNK_BYTES)).view(count.shape[0], -1, _CHUNK_BYTES)
    sums = padded.sum(-1, dtype=torch.int32)
    return sums.cumsum(1, dtype=torch.int32) - sums


@cache
def _tile(form: str, sizes: tuple[int, ...]) -> Any:
    kernels = _kernels()
    if reason := kernels.why_not(form, sizes):
        raise InputError(f"triton_bitmask cannot run configuration {[form, *sizes]}: {reason}")
    return kernels.Tile(form, *sizes)


@lru_cache(maxsize=4096)
def _choose(gpu: str, pattern: str, dtype: torch.dtype, shape: tuple[int, int], rows: int) -> Any:
    """The tile for ``rows`` activation rows: the one measured on this GPU, as its tables were at the first such product, or the default."""
    measured = tuning.lookup(gpu, pattern, dtype, shape, rows).get(TritonBitmaskKernel.name)
    if measured is None or not measured.config:
        return _kernels().default_tile(rows, *shape, dtype)
    form, *sizes = measured.config
    if not isinstance(form, str) or not all(type(size) is int for size in sizes):
        raise InputError(f"the {measured.source} for {gpu} gives triton_bitmask {list(measured.config)}, not a form and whole sizes")
    return _tile(form, tuple(sizes))


_gpu_name = cache(torch.cuda.get_device_name)


def _check(
    x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor | None, starts: Tensor | None, bias: Tensor | None, n: int, m: int
) -> None:
    rows, columns = bitmask.shape[0], x.shape[-1]
    if x.dtype != values.dtype or (bias is not None and bias.dtype != values.dtype):
        given = f"x is {x.dtype}" if bias is None else f"x is {x.dtype} and the bias {bias.dtype}"
        raise InputError(f"the packed weight is {values.dtype} but {given}: convert them to one type")
    parts = {"values": values, "bitmask": bitmask, "row_offsets": row_offsets, "chunk_starts": starts, "bias": bias}
    for name, tensor in parts.items():
        if tensor is not None and tensor.device != x.device:
            raise InputError(f"x is on {x.device} but {name} is on {tensor.device}: move them to one device")
    stored_fit = values.numel() * m == rows * columns * n if row_offsets is None else row_offsets.shape == (rows + 1,)
    if bitmask.shape[1] != -(-columns // 8) or not stored_fit:
        raise InputError(f"x has {columns} columns, which does not fit a packed weight with a bitmask of {tuple(bitmask.shape)}")
    if bias is not None and bias.shape != (rows,):
        raise InputError(f"the bias has shape {tuple(bias.shape)}, expected ({rows},) for a packed weight of {rows} rows")
    chunks = -(-bitmask.shape[1] // _CHUNK_BYTES)
    if starts is not None and starts.shape != (rows, chunks):
        raise InputError(
            f"chunk_starts has shape {tuple(starts.shape)}, expected ({rows}, {chunks}) for a bitmask of {tuple(bitmask.shape)}"
        )


def _launch(kernels: ModuleType, *arguments: Any) -> None:
    try:
        kernels.bitmask_linear(*arguments)
    except kernels.OutOfResources as error:
        raise KernelUnavailableError(f"triton_bitmask cannot run {list(arguments[-2])} on this GPU: {error}") from None


def _linear(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_offsets: Tensor | None,
    starts: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
    form: str,
    sizes: list[int],
) -> Tensor:
    _check(x, values, bitmask, row_offsets, starts, bias, n, m)
    y = x.new_empty((*x.shape[:-1], bitmask.shape[0]))
    if y.numel() == 0:
        return y
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    if form:
        tile = _tile(form, tuple(sizes))
    else:
        pattern = f"{n}:{m}" if row_offsets is None else "unstructured"
        tile = _choose(_gpu_name(x.device), pattern, x.dtype, (bitmask.shape[0], flat.shape[1]), flat.shape[0])
    contiguous = [t if t is None else t.contiguous() for t in (values, bitmask, row_offsets, starts, bias)]
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device(x.device):
        _launch(_kernels(), flat, *contiguous, n, m, tile, y.view(-1, y.shape[-1]))
    return y


def _fake(x: Tensor, values: Tensor, bitmask: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], bitmask.shape[0]))


_op = define_linear(
    "triton_bitmask_linear",
    _linear,
    ("CUDA",),
    arguments="Tensor x, Tensor values, Tensor bitmask, Tensor? row_offsets, Tensor? chunk_starts, Tensor? bias, "
    "int n, int m, str form, int[] sizes",
    fake=_fake,
)


class TritonBitmaskKernel(Kernel):
    name = "triton_bitmask"
    formats: ClassVar[frozenset[str]] = frozenset({"nm", "unstructured"})
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset(VALUE_DTYPES)

    def unsupported(self, problem: Problem) -> str | None:
        return _why_unavailable()

    def cost(self, problem: Problem) -> float:
        # Not measured on a GPU yet. Set so that every measured kernel goes first and only the reference, which unpacks the weight
        # at each call, comes after: a slow launch, and a small part of any GPU's bandwidth and of its tensor cores.
        flops = 2.0 * problem.rows * problem.out_features * problem.in_features
        return 100.0 + problem.packed_nbytes * 1e-5 + flops * 5e-8

    def prepare(self, packed: PackedWeight) -> Layout:
        if packed.pattern.is_nm:
            return packed.tensors
        return {**packed.tensors, "chunk_starts": chunk_starts(packed.tensors["bitmask"])}

    def recover(self, layout: Layout, packed: PackedWeight) -> PackedWeight:
        return super().recover({name: tensor for name, tensor in layout.items() if name != "chunk_starts"}, packed)

    def layout_nbytes(self, problem: Problem, packed: PackedWeight) -> int:
        chunks = 0 if packed.pattern.is_nm else problem.out_features * -(-problem.in_features // (8 * _CHUNK_BYTES))
        return packed.nbytes + 4 * chunks

    def configs(self, problem: Problem) -> Sequence[Config]:
        """Form and sizes as kernels/bitmask.py's ``Tile`` names them, the default first."""
        tiles = _kernels().tiles(problem.rows, problem.out_features, problem.in_features, problem.dtype)
        return [tuple(tile) for tile in tiles]

    def run(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern) -> Tensor:
        return self.run_config(x, layout, bias, pattern, ("",))

    def run_config(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern, config: Config) -> Tensor:
        form, *sizes = config or ("",)
        values, bitmask, n, m = layout["values"], layout["bitmask"], pattern.n or 0, pattern.m or 0
        return _op(x, values, bitmask, layout.get("row_offsets"), layout.get("chunk_starts"), bias, n, m, form, sizes)


register(TritonBitmaskKernel())
