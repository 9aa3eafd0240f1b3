"""2:4 weights of int8 or fp8 values on Hopper: activations become levels of the same type row by row, and sparse wgmma multiplies them.

The kernels are csrc/cuda/quantise_rows.cu and prefill_nm8.cu. y = (levels of x · levels of W) · scale of x's row · scale of W's row
(W8A8 with dynamic scales per token, Yao et al. 2022, "ZeroQuant", section 4.2). Sums of int8 levels are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine import cuda, tuning, value_types
from sparse_engine.backends.cuda_decode import UNIT, Gpu, check_arguments, fragment_linear_fake, gpu
from sparse_engine.backends.cuda_levels import LEVELS, quantise_compilation, quantise_rows
from sparse_engine.backends.cuda_nm import mask_table, metadata_table
from sparse_engine.backends.cuda_prefill import Call, bucket_of
from sparse_engine.backends.cuda_prefill.wgmma import CLOCKS_PER_US, Levels, PrefillSource, PrefillTile, run_prefill, tile_of
from sparse_engine.errors import InputError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.levels import TokenLevels, new_levels
from sparse_engine.ops import define_linear
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Config, Kernel, Layout, Problem, register

__all__ = ["SOURCES", "TILES", "TO_LEVELS", "from_blocks", "to_blocks"]

_NAME = "cuda_nm_8bit"
_TWO_FOUR = SparsityPattern.nm(2, 4)
BLOCK = 64
"""Rows of a block of the layout."""
_STAGE = 128
"""Columns of a stage."""
_VALUES, _POSITIONS = BLOCK * _STAGE // 2, BLOCK * _STAGE // 8
"""Bytes of a block's stage."""


@dataclass(frozen=True, slots=True)
class EightBitSource(PrefillSource):
    join_units: ClassVar[float] = 4.5

    def tensor_stores(self, tile: PrefillTile) -> bool:
        return True

    def weight_stage_bytes(self, tile: PrefillTile) -> int:
        return tile.rows // BLOCK * (_VALUES + _POSITIONS)


SOURCES = {element: EightBitSource("prefill_nm8.cu", "prefill_nm8", (("VALUES", number),)) for element, number in LEVELS.items()}
_FLOATS = torch.float8_e4m3fn
TO_LEVELS = replace(SOURCES[_FLOATS], macros=(*SOURCES[_FLOATS].macros, ("OUT_LEVELS", 1)))
"""What leaves levels behind a ReLU, by tiles without splits."""
TILES = (
    PrefillTile(24, 2, 2, 4, 2),
    PrefillTile(24, 1, 3, 5, 2),
    PrefillTile(32, 1, 2, 5, 2),
    PrefillTile(32, 1, 2, 4, 1),
    PrefillTile(16, 2, 2, 5, 2),
    PrefillTile(16, 1, 2, 6, 2),
    PrefillTile(16, 1, 2, 6, 1),
    PrefillTile(32, 1, 2, 4, 1, splits=2),
    PrefillTile(32, 1, 2, 4, 1, splits=3),
    PrefillTile(32, 1, 2, 4, 1, splits=4),
    PrefillTile(24, 2, 2, 4, 1, splits=2),
    PrefillTile(16, 2, 2, 5, 1, splits=2),
    PrefillTile(16, 1, 2, 6, 1, splits=2),
    PrefillTile(16, 1, 2, 6, 1, splits=4),
    PrefillTile(24, 1, 3, 5, 2, splits=0),
    PrefillTile(32, 1, 2, 5, 2, splits=0),
    PrefillTile(16, 1, 2, 6, 2, splits=0),
    PrefillTile(8, 1, 2, 8, 1),
    PrefillTile(8, 1, 2, 8, 1, splits=2),
    PrefillTile(4, 1, 2, 8, 1),
    PrefillTile(4, 1, 2, 8, 1, splits=4),
)
"""What tuning measures for 256 and more activation rows; the last two are for few."""
_H200 = Gpu("NVIDIA H200", "sm_90a", 132, True, 232448)


def _extent(shape: tuple[int, int]) -> tuple[int, int]:
    """Row blocks and stages of a (rows, columns) weight."""
    return -(-shape[0] // BLOCK), -(-shape[1] // UNIT) * (UNIT // _STAGE)


@cache
def _chunks(device: torch.device) -> Tensor:
    """Int64 (64, 4): the 16-byte chunk of a row that stands at each place of it; its own inverse."""
    rows = torch.arange(BLOCK, device=device)[:, None]
    return torch.arange(4, device=device) ^ (rows // 2 % 4)


def _exchanged(values: Tensor) -> Tensor:
    """Values (..., 64, 4, 16) with the chunks of each row exchanged, or back."""
    return values.gather(-2, _chunks(values.device)[..., None].expand(values.shape))


def to_blocks(values: Tensor, bitmask: Tensor, shape: tuple[int, int]) -> Tensor:
    """The layout that prefill_nm8.cu describes, (row blocks, stages, 5120) in the type of ``values``, from 8-bit values and a bitmask."""
    blocks, stages = _extent(shape)
    levels = F.pad(values.view(torch.uint8), (0, stages * _STAGE // 2 - values.shape[1], 0, blocks * BLOCK - shape[0]))
    masks = F.pad(bitmask, (0, stages * _STAGE // 8 - bitmask.shape[1], 0, blocks * BLOCK - shape[0]))
    masks = metadata_table(masks.device)[masks.int()]
    out = torch.empty(blocks, stages, _VALUES + _POSITIONS, dtype=torch.uint8, device=values.device)
    out[..., :_VALUES] = _exchanged(levels.view(blocks, BLOCK, stages, 4, 16).transpose(1, 2)).flatten(2)
    # block, warp, half, g | stage, step, k-half, byte  ->  block, stage, thread (warp, g, k-half, half), step, byte
    out[..., _VALUES:] = masks.view(blocks, 4, 2, 8, stages, 2, 2, 4).permute(0, 4, 1, 3, 6, 2, 5, 7).flatten(2)
    return out.view(values.dtype)


def from_blocks(layout: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Values and bitmask that :func:`to_blocks` was given, exactly."""
    (rows, columns), (blocks, stages), stored = shape, _extent(shape), layout.view(torch.uint8)
    levels = _exchanged(stored[..., :_VALUES].reshape(blocks, stages, BLOCK, 4, 16)).transpose(1, 2)
    values = levels.reshape(blocks * BLOCK, stages * _STAGE // 2)[:rows, : columns // 2].contiguous()
    masks = stored[..., _VALUES:].reshape(blocks, stages, 4, 8, 2, 2, 2, 4).permute(0, 2, 5, 3, 1, 6, 4, 7)
    bitmask = masks.reshape(blocks * BLOCK, stages * _STAGE // 8)[:rows, : -(-columns // 8)].contiguous()
    bitmask = mask_table(bitmask.device)[bitmask.int()]
    if columns % 8:
        bitmask[:, -1] &= 15
    return values.view(layout.dtype), bitmask


def _largest_norm(values: Tensor, scales: Tensor) -> Tensor:
    """Float32 (1,): the largest norm of a row of the weight."""
    # By and by: as float32 the values take four times their memory.
    norms = torch.cat([part.float().norm(dim=1) for part in (values[i : i + 4096] for i in range(0, len(values), 4096))])
    return (norms * scales).max().reshape(1)


def _clocks(tile: PrefillTile, rows: int, columns: int, m: int, here: Gpu) -> float:
    """Estimated clocks of a launch whose tiles run in whole rounds, fitted to measurements of 19 shapes on an H100.

    A product of m64 by 64 columns, half a clock for each activation row, is bound by shared memory at 128 bytes a clock: it reads both
    operands, and what is copied is written once for all m64 blocks. L2 gives 6,600 bytes a clock to all blocks, 52 to one; in long runs
    more comes to blocks of a cluster, which stay together.
    """
    blocks, splits = tile.rows // BLOCK, max(tile.splits, 1)
    tiles, resident = tile.tiles(rows, m) * tile.cluster * splits, tile.clusters(here) * tile.cluster * splits
    rounds = -(-tiles // resident)
    copied = 64 * tile.tokens / tile.cluster + 40 * tile.rows
    moved = (64 * tile.tokens + 2048) * blocks + 64 * tile.tokens + 40 * tile.rows
    step = max(blocks * tile.tokens / 2, moved / 128, copied / min(52.0, 6600.0 / min(tiles, resident)))
    if tile.cluster == 1:
        step *= 1 + rounds / 80
    store = (4700 + 13 * tile.m_blocks * tile.tokens) * (1.0 if tile.splits == 1 else 2.3)
    multiply = -(-columns // UNIT) * (UNIT / 64) * step
    return tile.clocks(rows, m, here, multiply, store) + (1400 if tile.cluster * splits == 1 else 2400)


@cache
def _tile_for(element: torch.dtype, dtype: torch.dtype, rows: int, columns: int, bucket: int, here: Gpu) -> PrefillTile:
    """The fastest tile that was measured on this GPU, with levels of this type or of the other, else the one with the lowest estimate."""
    for kind in sorted(map(value_types.of_element, LEVELS), key=lambda kind: kind != value_types.of_element(element)):
        measured = tuning.lookup(here.name, tuning.pattern_key(_TWO_FOUR, kind), dtype, (rows, columns), bucket).get(_NAME)
        if measured is not None and measured.config in _configs(rows, columns, bucket, here):
            return tile_of(measured.config)
    return _ordered_tiles(rows, columns, bucket, here)[0]


def _configs(rows: int, columns: int, m: int, here: Gpu) -> list[Config]:
    return [("wgmma-8bit", *astuple(tile)) for tile in _ordered_tiles(rows, columns, m, here)]


@cache
def _ordered_tiles(rows: int, columns: int, m: int, here: Gpu) -> tuple[PrefillTile, ...]:
    """Tiles that fit, those with the lowest estimate first."""
    source = SOURCES[torch.int8]
    able = [tile for tile in TILES if source.fits(tile, here) and tile.serves(rows, columns, m, here)]
    return tuple(sorted(able, key=lambda tile: _clocks(tile, rows, columns, m, here)))


def _product(tile: PrefillTile | None, call: Call, scales: Tensor, tokens: TokenLevels | None = None, left: Tensor | None = None) -> Tensor:
    """The product of ``call``; where ``tokens`` are given, the shape and type alone of its x are looked at.

    ``left`` (m, rows): the levels that it is left as, by scales that the tokens came with.
    """
    x, m, element = call.x, call.m, call.weight.dtype
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise InputError(f"x is {x.dtype}, but quantised weights take bfloat16 or float16 activations here; cast x")
    # The weight has no type that x could have.
    check_arguments(x, call.weight.view(x.dtype), call.bias, call.residual, call.rows, call.columns)
    if tokens is not None and tokens.values.dtype is not element:
        raise InputError(f"the activations are levels of type {tokens.values.dtype}, but the weight's are {element}")
    with torch.cuda.device(x.device):
        if m == 0:
            return x.new_empty((*x.shape[:-1], call.rows))
        chosen = tile or _tile_for(element, x.dtype, call.rows, call.columns, bucket_of(m), gpu(x.device.index))
        if tokens is None:
            tokens = quantise_rows(x.reshape(m, call.columns), element)
        levels = Levels(tokens.values, tokens.scales, scales)
        if left is None:
            return run_prefill(SOURCES[element], chosen, call, levels)
        assert tokens.ahead is not None
        return run_prefill(TO_LEVELS, chosen, call, replace(levels, y=left, y_times=tokens.ahead[1]))


def _call_of(tokens: TokenLevels, layout: Layout, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Call:
    """A product of ``tokens``, whose x has their shape and type, and no memory."""
    rows, columns, _ = layout["extent"].shape
    x = tokens.scales.new_empty(1, dtype=tokens.dtype).expand(tokens.values.shape)
    return Call("2:4", x, layout["weight"], bias, residual, rows, columns, relu)


def _linear(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None, rows: int, columns: int, relu: bool
) -> Tensor:
    return _product(None, Call("2:4", x, weight, bias, residual, rows, columns, relu), scales)


def _fake(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None, rows: int, *_: object) -> Tensor:
    return fragment_linear_fake(x, weight, bias, residual, rows)


_op = define_linear(
    "cuda_nm_8bit_linear",
    _linear,
    ("CUDA",),
    arguments="Tensor x, Tensor weight, Tensor scales, Tensor? bias, Tensor? residual, int rows, int columns, bool relu",
    fake=_fake,
)


class CudaNM8BitKernel(Kernel):
    name = _NAME
    formats: ClassVar[frozenset[str]] = frozenset({"nm"})
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})
    value_types: ClassVar[frozenset[str]] = frozenset({"int8", "fp8"})
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.bfloat16, torch.float16})
    in_place: ClassVar[bool] = False

    def unsupported(self, problem: Problem) -> str | None:
        if problem.pattern.group != (2, 4):
            return f"runs 2:4, not {problem.pattern}"
        if problem.capability is not None and problem.capability != (9, 0):
            return f"needs compute capability 9.0, not {problem.capability[0]}.{problem.capability[1]}"
        return cuda.why_unavailable()

    def cost(self, problem: Problem) -> float:
        size = (problem.out_features, problem.in_features, problem.rows)
        return 5.0 + max(_clocks(_ordered_tiles(*size, _H200)[0], *size, _H200) / CLOCKS_PER_US, problem.packed_nbytes / 4.0e6)

    def layout_nbytes(self, problem: Problem, packed: PackedWeight) -> int:
        blocks, stages = _extent((problem.out_features, problem.in_features))
        norm = 4 if problem.value_type == "fp8" else 0
        return blocks * stages * (_VALUES + _POSITIONS) + 4 * problem.out_features + norm

    def configs(self, problem: Problem) -> Sequence[Config]:
        return _configs(problem.out_features, problem.in_features, problem.rows, gpu(torch.cuda.current_device()))

    def compilations(self, problem: Problem, config: Config) -> Sequence[tuple[str, str, tuple[tuple[str, int], ...]]]:
        arch, element = gpu(torch.cuda.current_device()).arch, value_types.get(problem.value_type).element(problem.dtype)
        source = SOURCES[element]
        return (source.file, arch, source.all_macros(tile_of(config), problem.dtype)), quantise_compilation(arch, problem.dtype, element)

    def prepare(self, packed: PackedWeight) -> Layout:
        values, bitmask = packed.tensors["values"], packed.tensors["bitmask"]
        # The last tensor holds nothing; its shape tells `run` the size of the weight inside the padding.
        extent = bitmask.new_empty((*packed.shape, 0))
        layout = {"weight": to_blocks(values, bitmask, packed.shape), "scales": packed.tensors["scales"], "extent": extent}
        if values.dtype is _FLOATS:
            layout["norm"] = _largest_norm(values, packed.tensors["scales"])
        return layout

    def recover(self, layout: Layout, packed: PackedWeight) -> PackedWeight:
        values, bitmask = from_blocks(layout["weight"], packed.shape)
        return replace(packed, tensors={"values": values, "bitmask": bitmask, "scales": layout["scales"]})

    def run(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern) -> Tensor:
        return self.run_fused(x, layout, bias, pattern)

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
        return _op(x, layout["weight"], layout["scales"], bias, residual, rows, columns, relu)

    def levels_of(self, layout: Layout) -> torch.dtype:
        return layout["weight"].dtype

    def run_levels(
        self,
        tokens: TokenLevels,
        layout: Layout,
        bias: Tensor | None,
        pattern: SparsityPattern,
        *,
        relu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        return _product(None, _call_of(tokens, layout, bias, residual, relu), layout["scales"], tokens)

    def relu_norm(self, layout: Layout) -> Tensor | None:
        return layout.get("norm")

    def leaves_levels(self, layout: Layout, rows: int, dtype: torch.dtype) -> bool:
        if "norm" not in layout:
            return False
        out, columns, _ = layout["extent"].shape
        # Sums of splits meet in another epilogue.
        return _tile_for(_FLOATS, dtype, out, columns, bucket_of(rows), gpu(layout["weight"].device.index)).splits <= 1

    def relu_levels(self, tokens: TokenLevels, layout: Layout, bias: Tensor | None, pattern: SparsityPattern) -> TokenLevels:
        if tokens.ahead is None:
            raise InputError("the activations come without scales for what is left behind a ReLU; make them with a relu_bound")
        call = _call_of(tokens, layout, bias, None, True)
        made = new_levels(call.m, call.rows, _FLOATS, tokens.dtype, tokens.values.device)
        _product(None, call, layout["scales"], tokens, made.values)
        return replace(made, scales=tokens.ahead[0])

    def rows_of(self, layout: Layout, begin: int, end: int) -> Layout | None:
        if begin % BLOCK or (end % BLOCK and end != layout["extent"].shape[0]):
            return None
        extent = layout["extent"].new_empty((end - begin, *layout["extent"].shape[1:]))
        part = {"weight": layout["weight"][begin // BLOCK : -(-end // BLOCK)], "scales": layout["scales"][begin:end], "extent": extent}
        return {**layout, **part}

    def run_config(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern, config: Config) -> Tensor:
        if not config:
            return self.run(x, layout, bias, pattern)
        rows, columns, _ = layout["extent"].shape
        call = Call("2:4", x, layout["weight"], bias, None, rows, columns, False)
        return _product(tile_of(config), call, layout["scales"])


register(CudaNM8BitKernel())
