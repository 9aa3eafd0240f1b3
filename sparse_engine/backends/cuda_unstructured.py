"""Unstructured weights on NVIDIA GPUs, few activation rows: every lane of a warp expands its own stream of values from its mask.

The kernel is csrc/cuda/decode_unstructured.cu, which describes the layout. More than 64 rows run as slabs of 64.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine import cuda
from sparse_engine.backends.cuda_decode import UNIT, run_decode
from sparse_engine.backends.cuda_tiles import choose, cost_us, unstructured_parts
from sparse_engine.formats.base import PackedWeight, unpack_bits
from sparse_engine.ops import define_linear
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Kernel, Layout, Problem, register

_TILES_AT_ONCE = 64
"""Row tiles laid out in one go, which bounds the temporary memory of `prepare`."""


def _streams(bitmask: Tensor, tiles: int, units: int, steps: int) -> Tensor:
    """Mask bytes (rows, ceil(columns / 8)), padded to whole tiles and units, as (tiles, units, 32 lanes, 2 · steps): byte 2s + half."""
    padded = F.pad(bitmask, (0, units * steps * 4 - bitmask.shape[1], 0, tiles * 16 - bitmask.shape[0]))
    # tile, half, g | unit, step, t  ->  tile, unit, lane (g, t), step, half
    return padded.view(tiles, 2, 8, units, steps, 4).permute(0, 3, 2, 5, 4, 1).reshape(tiles, units, 32, 2 * steps)


def _places(masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where a part's values lie in the layout: ``masks`` is (tiles, units, 32, bytes).

    Returns (keep (tiles, units, 32, 8 · bytes) bool, half-word place of each kept value within the part, in order of ``keep``; the
    sizes of the units in 16 bytes; the words of each lane).
    """
    keep = unpack_bits(masks.reshape(-1, masks.shape[-1]), masks.shape[-1] * 8).view(*masks.shape[:3], -1)
    index = keep.cumsum(-1, dtype=torch.int32) - 1
    words = (index[..., -1] + 2) // 2
    longest = torch.arange(max(int(words.max()), 1), device=masks.device)
    having = words.unsqueeze(-2) > longest.unsqueeze(-1)
    flat = having.flatten(-2)
    # Words that lie before word j of lane l in its unit: (tiles, units, j, lane).
    before = (flat.cumsum(-1, dtype=torch.int32) - flat.int()).view_as(having)
    sizes = (words.sum(-1) + 3) // 4
    starts = (sizes.flatten().cumsum(0) - sizes.flatten()).view_as(sizes)
    place = before.transpose(-1, -2).gather(-1, (index.clamp_min(0) // 2).long())
    place = (starts[..., None, None] * 4 + place) * 2 + index % 2
    return keep, place[keep], sizes, words


def _chunks(packed_shape: tuple[int, int], parts: int) -> tuple[int, int, Iterator[tuple[int, int]]]:
    tiles, units = -(-packed_shape[0] // 16), -(-packed_shape[1] * parts // UNIT)
    return tiles, units, ((i, min(i + _TILES_AT_ONCE, tiles)) for i in range(0, tiles, _TILES_AT_ONCE))


def to_streams(values: Tensor, bitmask: Tensor, shape: tuple[int, int], parts: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """The layout that decode_unstructured.cu describes: (values, masks, offsets int32, depth in words of the longest lane stream)."""
    tiles, units, chunks = _chunks(shape, parts)
    steps = 8 // parts
    masks = _streams(bitmask, tiles, units, steps)
    counts = torch.zeros(tiles * 16, dtype=torch.int64, device=values.device)
    counts[: shape[0]] = unpack_bits(bitmask, shape[1]).sum(1)
    ends = counts.view(tiles, 16).sum(1).cumsum(0).tolist()
    pieces, sizes, depth, first = [], [], 1, 0
    for begin, end in chunks:
        keep, place, size, words = _places(masks[begin:end])
        part = values[first : ends[end - 1]]
        first = ends[end - 1]
        rows = min(end * 16, shape[0]) - begin * 16
        dense = values.new_zeros(((end - begin) * 16, units * steps * 32))
        dense[:rows, : shape[1]] = values.new_zeros(rows, shape[1]).masked_scatter_(
            unpack_bits(bitmask[begin * 16 : begin * 16 + rows], shape[1]), part
        )
        stream = dense.view(end - begin, 2, 8, units, steps, 4, 8).permute(0, 3, 2, 5, 4, 1, 6).reshape(keep.shape)
        piece = values.new_zeros(int(size.sum()) * 8)
        piece[place] = stream[keep]
        pieces.append(piece)
        sizes.append(size.flatten())
        depth = max(depth, int(words.max()))
    offsets = torch.zeros(tiles * units + 1, dtype=torch.int64, device=values.device)
    offsets[1:] = torch.cat(sizes).cumsum(0)
    return torch.cat(pieces), masks, offsets.int(), depth


def from_streams(streams: Tensor, masks: Tensor, offsets: Tensor, shape: tuple[int, int], parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, bitmask and row offsets that :func:`to_streams` was given, exactly."""
    tiles, units, chunks = _chunks(shape, parts)
    steps = 8 // parts
    padded = masks.view(tiles, units, 8, 4, steps, 2).permute(0, 5, 2, 1, 4, 3).reshape(tiles * 16, units * steps * 4)
    bitmask = padded[: shape[0], : -(-shape[1] // 8)].contiguous()
    pieces = []
    for begin, end in chunks:
        keep, place, _, _ = _places(masks[begin:end])
        start = int(offsets[begin * units]) * 8
        stream = streams.new_zeros(keep.shape)
        stream[keep] = streams[start + place]
        dense = stream.view(end - begin, units, 8, 4, steps, 2, 8).permute(0, 5, 2, 1, 4, 3, 6).reshape((end - begin) * 16, -1)
        rows = min(end * 16, shape[0]) - begin * 16
        pieces.append(dense[:rows, : shape[1]][unpack_bits(bitmask[begin * 16 : begin * 16 + rows], shape[1])])
    row_offsets = torch.zeros(shape[0] + 1, dtype=torch.int64, device=streams.device)
    row_offsets[1:] = unpack_bits(bitmask, shape[1]).sum(1).cumsum(0)
    return torch.cat(pieces), bitmask, row_offsets


_choose = partial(choose, "unstructured")


def _linear(
    x: Tensor,
    weight: Tensor,
    masks: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: int,
    columns: int,
    depth: int,
    relu: bool,
) -> Tensor:
    return run_decode(_choose, x, weight, bias, residual, rows, columns, relu, streams=(masks, offsets, depth))


def _fake(
    x: Tensor, weight: Tensor, masks: Tensor, offsets: Tensor, bias: Tensor | None, residual: Tensor | None, rows: int, *_: object
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


_op = define_linear(
    "cuda_unstructured_linear",
    _linear,
    ("CUDA",),
    arguments="Tensor x, Tensor weight, Tensor masks, Tensor offsets, Tensor? bias, Tensor? residual, "
    "int rows, int columns, int depth, bool relu",
    fake=_fake,
)


class CudaUnstructuredKernel(Kernel):
    name = "cuda_unstructured"
    formats: ClassVar[frozenset[str]] = frozenset({"unstructured"})
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.bfloat16, torch.float16})
    in_place: ClassVar[bool] = False

    def unsupported(self, problem: Problem) -> str | None:
        if problem.capability is not None and problem.capability < (8, 0):
            return f"needs compute capability 8.0 or newer, not {problem.capability[0]}.{problem.capability[1]}"
        return cuda.why_unavailable()

    def cost(self, problem: Problem) -> float:
        return cost_us("unstructured", problem, problem.packed_nbytes)

    def prepare(self, packed: PackedWeight) -> Layout:
        values, bitmask = packed.tensors["values"], packed.tensors["bitmask"]
        streams, masks, offsets, depth = to_streams(values, bitmask, packed.shape, unstructured_parts(packed.shape[1]))
        # The last tensor holds nothing; its shape tells `run` the weight's size and the streams' depth.
        return {"weight": streams, "masks": masks, "offsets": offsets, "extent": values.new_empty((*packed.shape, depth, 0))}

    def recover(self, layout: Layout, packed: PackedWeight) -> PackedWeight:
        parts = 16 // layout["masks"].shape[-1]
        values, bitmask, row_offsets = from_streams(layout["weight"], layout["masks"], layout["offsets"], packed.shape, parts)
        tensors = {"values": values, "bitmask": bitmask, "row_offsets": row_offsets}
        return PackedWeight(packed.format, packed.version, packed.pattern, packed.shape, packed.dtype, tensors)

    def run(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern) -> Tensor:
        rows, columns, depth, _ = layout["extent"].shape
        return _op(x, layout["weight"], layout["masks"], layout["offsets"], bias, None, rows, columns, depth, False)


register(CudaUnstructuredKernel())
