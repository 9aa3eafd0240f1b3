"""2:4 and 4:8 weights on NVIDIA GPUs, few activation rows: weights in fragment order, streamed once through tensor cores.

The kernels are csrc/cuda/decode_nm.cu and, on Hopper, decode_row_stream.cu for few rows and decode_wgmma.cu for more. 2:4 uses sparse
tensor-core instructions (Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", section 4), 4:8 expands in registers from its
mask into dense ones. What runs more rows than a kernel takes is chosen by the package cuda_prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine import cuda
from sparse_engine.backends import cuda_prefill, cuda_row_forms
from sparse_engine.backends.cuda_decode import UNIT, fragment_linear_fake, run_decode
from sparse_engine.backends.cuda_tiles import choose, compilations, configs, current_gpu, estimate_us, parse
from sparse_engine.formats.base import PackedWeight
from sparse_engine.ops import define_linear
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Config, Kernel, Layout, Problem, register

_CHUNK = 9 * 32 * 16
"""Bytes of one row tile of 16 by one unit of 256 columns: 9 times 16 bytes for each of 32 lanes."""


@cache
def metadata_table(device: torch.device) -> Tensor:
    """Mask byte (two groups of four) to sparse tensor-core metadata byte: per group the two kept positions, 2 bits each."""
    table = []
    for byte in range(256):
        nibbles = []
        for mask in (byte & 15, byte >> 4):
            kept = [i for i in range(4) if mask >> i & 1]
            # Groups of the padding keep nothing; their values are zero, so any valid position will do.
            first, second = kept if len(kept) == 2 else (0, 1)
            nibbles.append(first | second << 2)
        table.append(nibbles[0] | nibbles[1] << 4)
    return torch.tensor(table, dtype=torch.uint8, device=device)


@cache
def mask_table(device: torch.device) -> Tensor:
    """Inverse of :func:`metadata_table` on bytes whose groups keep two."""
    table = [0] * 256
    for byte in range(256):
        low, high = byte & 15, byte >> 4
        table[byte] = (1 << (low & 3) | 1 << (low >> 2)) | (1 << (high & 3) | 1 << (high >> 2)) << 4
    return torch.tensor(table, dtype=torch.uint8, device=device)


def _extent(shape: tuple[int, int]) -> tuple[int, int]:
    """Row tiles and units of a (rows, columns) weight."""
    return -(-shape[0] // 16), -(-shape[1] // UNIT)


def to_fragments(values: Tensor, bitmask: Tensor, shape: tuple[int, int], group: int) -> Tensor:
    """The layout that decode_nm.cu describes, uint8 (row tiles, units, 9, 32, 16), from a packed 2:4 (``group`` 4) or 4:8 (8) weight."""
    tiles, units = _extent(shape)
    value_bytes = F.pad(values.view(torch.uint8), (0, units * UNIT - values.shape[1] * 2, 0, tiles * 16 - shape[0]))
    masks = F.pad(bitmask, (0, units * UNIT // 8 - bitmask.shape[1], 0, tiles * 16 - shape[0]))
    out = torch.empty(tiles, units, 9, 32, 16, dtype=torch.uint8, device=values.device)
    if group == 4:
        masks = metadata_table(masks.device)[masks.int()]
        # tile, half, g | unit, word, step, k-half, byte  ->  tile, unit, lane (g, step, k-half), word, half, byte
        out[:, :, 0] = masks.view(tiles, 2, 8, units, 4, 2, 2, 2).permute(0, 3, 2, 5, 6, 4, 1, 7).reshape(tiles, units, 32, 16)
        # tile, half, g | unit, step, k-half, t, 4 bytes  ->  tile, unit, step, lane (g, t), k-half, half, 4 bytes
        fragments = value_bytes.view(tiles, 2, 8, units, 8, 2, 4, 4).permute(0, 3, 4, 2, 6, 5, 1, 7)
    else:
        # tile, half, g | unit, step, t  ->  tile, unit, lane (g, t), step, half
        out[:, :, 0] = masks.view(tiles, 2, 8, units, 8, 4).permute(0, 3, 2, 5, 4, 1).reshape(tiles, units, 32, 16)
        # tile, half, g | unit, step, t, 8 bytes  ->  tile, unit, step, lane (g, t), half, 8 bytes
        fragments = value_bytes.view(tiles, 2, 8, units, 8, 4, 8).permute(0, 3, 4, 2, 5, 1, 6)
    out[:, :, 1:] = fragments.reshape(tiles, units, 8, 32, 16)
    return out


def from_fragments(layout: Tensor, shape: tuple[int, int], group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values and bitmask that :func:`to_fragments` was given, exactly."""
    (rows, columns), (tiles, units) = shape, _extent(shape)
    if group == 4:
        masks = layout[:, :, 0].reshape(tiles, units, 8, 2, 2, 4, 2, 2).permute(0, 6, 2, 1, 5, 3, 4, 7)
        fragments = layout[:, :, 1:].reshape(tiles, units, 8, 8, 4, 2, 2, 4).permute(0, 6, 3, 1, 2, 5, 4, 7)
    else:
        masks = layout[:, :, 0].reshape(tiles, units, 8, 4, 8, 2).permute(0, 5, 2, 1, 4, 3)
        fragments = layout[:, :, 1:].reshape(tiles, units, 8, 8, 4, 2, 8).permute(0, 5, 3, 1, 2, 4, 6)
    value_bytes = fragments.reshape(tiles * 16, units * UNIT)[:rows, :columns].contiguous()
    bitmask = masks.reshape(tiles * 16, units * UNIT // 8)[:rows, : -(-columns // 8)].contiguous()
    if group == 4:
        bitmask = mask_table(bitmask.device)[bitmask.int()]
        if columns % 8:
            bitmask[:, -1] &= 15
    return value_bytes.view(dtype), bitmask


_NAME = "cuda_nm"
_PATTERNS = {4: "2:4", 8: "4:8"}
_CHOOSERS = {group: partial(choose, _NAME, pattern) for group, pattern in _PATTERNS.items()}


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, rows: int, columns: int, group: int, relu: bool
) -> Tensor:
    call = cuda_prefill.Call(_PATTERNS[group], x, weight, bias, residual, rows, columns, relu)
    if x.numel() >= cuda_prefill.FEWEST_ROWS * columns:
        return cuda_prefill.product(_NAME, call)
    if (y := cuda_row_forms.product(_NAME, call)) is not None:
        return y
    return run_decode(_CHOOSERS[group], x, weight, bias, residual, rows, columns, relu)


_op = define_linear(
    "cuda_nm_linear",
    _linear,
    ("CUDA",),
    arguments="Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int rows, int columns, int group, bool relu",
    fake=fragment_linear_fake,
)


class CudaNMKernel(Kernel):
    name = _NAME
    formats: ClassVar[frozenset[str]] = frozenset({"nm"})
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.bfloat16, torch.float16})
    in_place: ClassVar[bool] = False

    def unsupported(self, problem: Problem) -> str | None:
        if problem.pattern.group not in ((2, 4), (4, 8)):
            return f"runs 2:4 and 4:8, not {problem.pattern}"
        if problem.capability is not None and problem.capability < (8, 0):
            return f"needs compute capability 8.0 or newer, not {problem.capability[0]}.{problem.capability[1]}"
        return cuda.why_unavailable()

    def cost(self, problem: Problem) -> float:
        if problem.rows >= cuda_prefill.FEWEST_ROWS:
            return cuda_prefill.estimate_of(problem)
        return estimate_us(problem, self._nbytes(problem))

    @staticmethod
    def _nbytes(problem: Problem) -> int:
        tiles, units = _extent((problem.out_features, problem.in_features))
        return _CHUNK * tiles * units

    def layout_nbytes(self, problem: Problem, packed: PackedWeight) -> int:
        return self._nbytes(problem)

    def configs(self, problem: Problem) -> Sequence[Config]:
        if problem.rows >= cuda_prefill.FEWEST_ROWS:
            return cuda_prefill.configs_of(problem)
        here = current_gpu()
        return [*cuda_row_forms.configs(problem, here), *configs(str(problem.pattern), problem, here)]

    def compilations(self, problem: Problem, config: Config) -> Sequence[tuple[str, str, tuple[tuple[str, int], ...]]]:
        if problem.rows >= cuda_prefill.FEWEST_ROWS:
            return cuda_prefill.compilations_of(problem, config)
        here = current_gpu()
        return cuda_row_forms.compilations(problem, config, here) or compilations(str(problem.pattern), problem, config, here)

    def prepare(self, packed: PackedWeight) -> Layout:
        values, bitmask = packed.tensors["values"], packed.tensors["bitmask"]
        fragments = to_fragments(values, bitmask, packed.shape, packed.pattern.group[1]).view(packed.dtype)
        # The second tensor holds nothing; its shape tells `run` the size of the weight inside the padding.
        return {"weight": fragments, "extent": values.new_empty((*packed.shape, 0))}

    def recover(self, layout: Layout, packed: PackedWeight) -> PackedWeight:
        values, bitmask = from_fragments(layout["weight"].view(torch.uint8), packed.shape, packed.pattern.group[1], packed.dtype)
        tensors = {"values": values, "bitmask": bitmask}
        return PackedWeight(packed.format, packed.version, packed.pattern, packed.shape, packed.dtype, tensors)

    def run(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern) -> Tensor:
        rows, columns, _ = layout["extent"].shape
        return _op(x, layout["weight"], bias, None, rows, columns, pattern.group[1], False)

    def run_fused(
        self,
        x: Tensor,
        layout: Layout,
        bias: Tensor | None,
        pattern: SparsityPattern,
        *,
        relu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        rows, columns, _ = layout["extent"].shape
        return _op(x, layout["weight"], bias, residual, rows, columns, pattern.group[1], relu)

    def rows_of(self, layout: Layout, begin: int, end: int) -> Layout | None:
        if begin % 16 or (end % 16 and end != layout["extent"].shape[0]):
            return None
        extent = layout["extent"].new_empty((end - begin, *layout["extent"].shape[1:]))
        return {"weight": layout["weight"][begin // 16 : -(-end // 16)], "extent": extent}

    def run_config(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern, config: Config) -> Tensor:
        rows, columns, _ = layout["extent"].shape
        call = cuda_prefill.Call(str(pattern), x, layout["weight"], bias, None, rows, columns, False)
        for run_config in (cuda_prefill.run_config, cuda_row_forms.run_config):
            if (y := run_config(call, config)) is not None:
                return y
        if (chosen := parse(str(pattern), config)) is None:
            return self.run(x, layout, bias, pattern)
        return run_decode(lambda *_: chosen, x, layout["weight"], bias, None, rows, columns, False)


register(CudaNMKernel())
