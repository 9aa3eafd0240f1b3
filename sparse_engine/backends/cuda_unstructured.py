"""Unstructured weights on NVIDIA GPUs, few activation rows: every lane of a warp expands its own stream of values from its mask.

The kernels are csrc/cuda/decode_unstructured.cu and, on Hopper, decode_row_stream.cu for few rows and decode_wgmma.cu for more; paired.cuh
describes the layout. What runs more rows than a kernel takes is chosen by the package cuda_prefill.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine import cuda
from sparse_engine.backends import cuda_prefill, cuda_row_forms
from sparse_engine.backends.cuda_decode import UNIT, Streams, run_decode
from sparse_engine.backends.cuda_tiles import choose, compilations, configs, current_gpu, estimate_us, parse, unstructured_parts
from sparse_engine.formats.base import PackedWeight, unpack_bits
from sparse_engine.ops import define_linear
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Config, Kernel, Layout, Problem, register

_TILES_AT_ONCE = 64
"""Row tiles laid out in one go, which bounds the temporary memory of `prepare`."""


def octet_places(byte: int, parity: int) -> tuple[list[int], int]:
    """Half-word places of the columns that ``byte`` keeps, -1 for the others, and how many half-words the octet takes.

    Places count from the start of the word that the octet's first half-word lies in; with ``parity`` 1 that word's first half is
    taken. See paired.cuh.
    """
    codes = [byte >> 2 * pair & 3 for pair in range(4)]
    kept, singles = byte.bit_count(), sum(code in (1, 2) for code in codes)
    places = [-1] * 8
    following, open_word, seen = parity, parity - 1, 0
    for pair, code in enumerate(codes):
        if code == 3:
            places[2 * pair], places[2 * pair + 1] = 2 * following, 2 * following + 1
            following += 1
        elif code:
            seen += 1
            if open_word >= 0:
                place, open_word = 2 * open_word + 1, -1
            elif seen == singles:
                place = 2 * ((parity + kept - 1) // 2)
            else:
                place, open_word = 2 * following, following
                following += 1
            places[2 * pair + code - 1] = place
    return places, kept + (parity if kept and not singles else 0)


@cache
def _octets(device: torch.device) -> tuple[Tensor, Tensor]:
    """:func:`octet_places` of every parity and byte: places int16 (2, 256, 8), lengths int16 (2, 256)."""
    octets = [[octet_places(byte, parity) for byte in range(256)] for parity in range(2)]
    places = torch.tensor([[places for places, _ in row] for row in octets], dtype=torch.int16, device=device)
    return places, torch.tensor([[length for _, length in row] for row in octets], dtype=torch.int16, device=device)


def _lane_masks(bitmask: Tensor, tiles: int, units: int, steps: int) -> Tensor:
    """Mask bytes (rows, ceil(columns / 8)), padded to whole tiles and units, as (tiles, units, 32 lanes, 2 · steps): byte 2s + half."""
    padded = F.pad(bitmask, (0, units * steps * 4 - bitmask.shape[1], 0, tiles * 16 - bitmask.shape[0]))
    # tile, half, g | unit, step, t  ->  tile, unit, lane (g, t), step, half
    return padded.view(tiles, 2, 8, units, steps, 4).permute(0, 3, 2, 5, 4, 1).reshape(tiles, units, 32, 2 * steps)


def _streams(masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Streams of a part's lanes: ``masks`` is (tiles, units, 32, bytes).

    Returns (start half-word of each octet's first word (tiles, units, 32, steps, 2), parity of each octet likewise, column of each
    lane's stream B (tiles, units, 32), words of each unit's columns (tiles, units)).
    """
    _, lengths = _octets(masks.device)
    octets = masks.view(*masks.shape[:3], -1, 2).long()
    before = torch.zeros_like(octets)
    length = torch.zeros_like(octets[..., 0, :])
    for step in range(octets.shape[3]):
        before[..., step, :] = length
        length = length + lengths[length & 1, octets[..., step, :]]
    # The shortest streams A take the longest streams B.
    first, lanes = length[..., 0].sort(dim=-1, stable=True)
    second, order = length[..., 1].sort(dim=-1, stable=True, descending=True)
    columns = torch.empty_like(lanes).scatter_(-1, order, lanes)
    return before & ~1, before & 1, columns, ((first + second + 1) // 2).amax(-1)


def _header_bytes(parts: int) -> int:
    return 512 // parts + 32


def _sizes(depths: Tensor, parts: int) -> Tensor:
    """Sizes of units in 16 bytes."""
    return depths * 8 + _header_bytes(parts) // 16


def _places(masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where a part's values lie in the layout: ``masks`` is (tiles, units, 32, bytes).

    Returns (keep (tiles, units, 32, 8 · bytes) bool, half-word place of each kept value within the part, in order of ``keep``, the
    columns and the depths that :func:`_streams` gives).
    """
    keep = unpack_bits(masks.reshape(-1, masks.shape[-1]), masks.shape[-1] * 8).view(*masks.shape[:3], -1)
    start, parity, columns, depths = _streams(masks)
    octets = masks.view(*masks.shape[:3], -1, 2).long()
    place = start.unsqueeze(-1) + _octets(masks.device)[0][parity, octets]
    word, half = place >> 1, place & 1
    bottom = (depths - 1).view(*depths.shape, 1, 1, 1)
    word[..., 1, :] = bottom - word[..., 1, :]
    half[..., 1, :] ^= 1
    lanes = torch.arange(32, device=masks.device).expand_as(columns)
    column = torch.stack((lanes, columns), -1).view(*columns.shape, 1, 2, 1)
    parts = 16 // masks.shape[-1]
    sizes = _sizes(depths, parts)
    starts = (sizes.flatten().cumsum(0) - sizes.flatten()).view(*sizes.shape, 1, 1, 1, 1) * 8 + _header_bytes(parts) // 2
    return keep, (starts + (word * 32 + column) * 2 + half).view(keep.shape)[keep], columns, depths


def _chunks(packed_shape: tuple[int, int], parts: int) -> tuple[int, int, Iterator[tuple[int, int]]]:
    tiles, units = -(-packed_shape[0] // 16), -(-packed_shape[1] * parts // UNIT)
    return tiles, units, ((i, min(i + _TILES_AT_ONCE, tiles)) for i in range(0, tiles, _TILES_AT_ONCE))


def to_streams(values: Tensor, bitmask: Tensor, shape: tuple[int, int], parts: int) -> tuple[Tensor, Streams]:
    """The layout that paired.cuh describes."""
    tiles, units, chunks = _chunks(shape, parts)
    steps = 8 // parts
    masks = _lane_masks(bitmask, tiles, units, steps)
    counts = torch.zeros(tiles * 16, dtype=torch.int64, device=values.device)
    counts[: shape[0]] = unpack_bits(bitmask, shape[1]).sum(1)
    ends = counts.view(tiles, 16).sum(1).cumsum(0).tolist()
    pieces, sizes, deepest, first = [], [], 1, 0
    for begin, end in chunks:
        keep, place, columns, depths = _places(masks[begin:end])
        part = values[first : ends[end - 1]]
        first = ends[end - 1]
        rows = min(end * 16, shape[0]) - begin * 16
        dense = values.new_zeros(((end - begin) * 16, units * steps * 32))
        dense[:rows, : shape[1]] = values.new_zeros(rows, shape[1]).masked_scatter_(
            unpack_bits(bitmask[begin * 16 : begin * 16 + rows], shape[1]), part
        )
        stream = dense.view(end - begin, 2, 8, units, steps, 4, 8).permute(0, 3, 2, 5, 4, 1, 6).reshape(keep.shape)
        size = _sizes(depths, parts).flatten()
        piece = values.new_zeros(int(size.sum()) * 8)
        piece[place] = stream[keep]
        header = torch.cat((masks[begin:end].reshape(-1, 512 // parts), columns.to(torch.uint8).view(-1, 32)), 1)
        piece.view(torch.uint8)[_header_places(size.cumsum(0) - size, parts)] = header
        pieces.append(piece)
        sizes.append(size)
        deepest = max(deepest, int(depths.max()))
    offsets = torch.zeros(tiles * units + 1, dtype=torch.int64, device=values.device)
    offsets[1:] = torch.cat(sizes).cumsum(0)
    return torch.cat(pieces), Streams(offsets.int(), deepest, parts)


def _header_places(starts: Tensor, parts: int) -> Tensor:
    """Places of the header's bytes of units that start at ``starts``, in 16 bytes."""
    return starts.long().unsqueeze(-1) * 16 + torch.arange(_header_bytes(parts), device=starts.device)


def from_streams(words: Tensor, streams: Streams, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Values, bitmask and row offsets that :func:`to_streams` was given, exactly."""
    tiles, units, chunks = _chunks(shape, streams.parts)
    steps = 8 // streams.parts
    mask_bytes = 512 // streams.parts
    masks = words.view(torch.uint8)[_header_places(streams.offsets[:-1], streams.parts)[:, :mask_bytes]].view(tiles, units, 32, 2 * steps)
    padded = masks.view(tiles, units, 8, 4, steps, 2).permute(0, 5, 2, 1, 4, 3).reshape(tiles * 16, units * steps * 4)
    bitmask = padded[: shape[0], : -(-shape[1] // 8)].contiguous()
    pieces = []
    for begin, end in chunks:
        keep, place, _, _ = _places(masks[begin:end])
        start = int(streams.offsets[begin * units]) * 8
        stream = words.new_zeros(keep.shape)
        stream[keep] = words[start + place]
        dense = stream.view(end - begin, units, 8, 4, steps, 2, 8).permute(0, 5, 2, 1, 4, 3, 6).reshape((end - begin) * 16, -1)
        rows = min(end * 16, shape[0]) - begin * 16
        pieces.append(dense[:rows, : shape[1]][unpack_bits(bitmask[begin * 16 : begin * 16 + rows], shape[1])])
    row_offsets = torch.zeros(shape[0] + 1, dtype=torch.int64, device=words.device)
    row_offsets[1:] = unpack_bits(bitmask, shape[1]).sum(1).cumsum(0)
    return torch.cat(pieces), bitmask, row_offsets


_NAME = "cuda_unstructured"
_choose = partial(choose, _NAME, "unstructured")


def _linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: int,
    columns: int,
    depth: int,
    parts: int,
    relu: bool,
) -> Tensor:
    streams = Streams(offsets, depth, parts)
    call = cuda_prefill.Call("unstructured", x, weight, bias, residual, rows, columns, relu, streams)
    if x.numel() >= cuda_prefill.FEWEST_ROWS * columns:
        return cuda_prefill.product(_NAME, call)
    if (y := cuda_row_forms.product(_NAME, call)) is not None:
        return y
    return run_decode(_choose, x, weight, bias, residual, rows, columns, relu, streams)


def _fake(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, residual: Tensor | None, rows: int, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


_op = define_linear(
    "cuda_unstructured_linear",
    _linear,
    ("CUDA",),
    arguments="Tensor x, Tensor weight, Tensor offsets, Tensor? bias, Tensor? residual, "
    "int rows, int columns, int depth, int parts, bool relu",
    fake=_fake,
)


class CudaUnstructuredKernel(Kernel):
    name = _NAME
    formats: ClassVar[frozenset[str]] = frozenset({"unstructured"})
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.bfloat16, torch.float16})
    in_place: ClassVar[bool] = False

    def unsupported(self, problem: Problem) -> str | None:
        if problem.capability is not None and problem.capability < (8, 0):
            return f"needs compute capability 8.0 or newer, not {problem.capability[0]}.{problem.capability[1]}"
        return cuda.why_unavailable()

    def cost(self, problem: Problem) -> float:
        if problem.rows >= cuda_prefill.FEWEST_ROWS:
            return cuda_prefill.estimate_of(problem)
        return estimate_us(problem, problem.packed_nbytes)

    def configs(self, problem: Problem) -> Sequence[Config]:
        if problem.rows >= cuda_prefill.FEWEST_ROWS:
            return cuda_prefill.configs_of(problem)
        here = current_gpu()
        return [*cuda_row_forms.configs(problem, here), *configs("unstructured", problem, here)]

    def compilations(self, problem: Problem, config: Config) -> Sequence[tuple[str, str, tuple[tuple[str, int], ...]]]:
        if problem.rows >= cuda_prefill.FEWEST_ROWS:
            return cuda_prefill.compilations_of(problem, config)
        here = current_gpu()
        return cuda_row_forms.compilations(problem, config, here) or compilations("unstructured", problem, config, here)

    def layout_nbytes(self, problem: Problem, packed: PackedWeight) -> int | None:
        if "bitmask" not in packed.tensors or packed.tensors["bitmask"].is_meta:
            return None
        parts = unstructured_parts(packed.shape[1])
        tiles, units, chunks = _chunks(packed.shape, parts)
        masks = _lane_masks(packed.tensors["bitmask"], tiles, units, 8 // parts)
        blocks = sum(int(_sizes(_streams(masks[begin:end])[3], parts).sum()) for begin, end in chunks)
        return blocks * 16 + 4 * (tiles * units + 1)

    def prepare(self, packed: PackedWeight) -> Layout:
        values, bitmask = packed.tensors["values"], packed.tensors["bitmask"]
        words, streams = to_streams(values, bitmask, packed.shape, unstructured_parts(packed.shape[1]))
        return {
            "weight": words,
            "offsets": streams.offsets,
            # Holds nothing; its shape tells `run` the weight's size, the units' depth and their parts.
            "extent": values.new_empty((*packed.shape, streams.depth, streams.parts, 0)),
        }

    def recover(self, layout: Layout, packed: PackedWeight) -> PackedWeight:
        values, bitmask, row_offsets = from_streams(layout["weight"], streams_of(layout), packed.shape)
        tensors = {"values": values, "bitmask": bitmask, "row_offsets": row_offsets}
        return PackedWeight(packed.format, packed.version, packed.pattern, packed.shape, packed.dtype, tensors)

    def run(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern) -> Tensor:
        rows, columns, depth, parts, _ = layout["extent"].shape
        return _op(x, layout["weight"], layout["offsets"], bias, None, rows, columns, depth, parts, False)

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
        rows, columns, depth, parts, _ = layout["extent"].shape
        return _op(x, layout["weight"], layout["offsets"], bias, residual, rows, columns, depth, parts, relu)

    def rows_of(self, layout: Layout, begin: int, end: int) -> Layout | None:
        if begin % 16 or (end % 16 and end != layout["extent"].shape[0]):
            return None
        tiles = slice(begin // 16, -(-end // 16))
        units = -(-layout["extent"].shape[1] * layout["extent"].shape[3] // UNIT)
        offsets = layout["offsets"][tiles.start * units : tiles.stop * units + 1]
        first, last = offsets[[0, -1]].tolist()
        return {
            "weight": layout["weight"][first * 8 : last * 8],
            "offsets": offsets - first,
            "extent": layout["extent"].new_empty((end - begin, *layout["extent"].shape[1:])),
        }

    def run_config(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern, config: Config) -> Tensor:
        rows, columns = layout["extent"].shape[:2]
        streams = streams_of(layout)
        call = cuda_prefill.Call("unstructured", x, layout["weight"], bias, None, rows, columns, False, streams)
        for run_config in (cuda_prefill.run_config, cuda_row_forms.run_config):
            if (y := run_config(call, config)) is not None:
                return y
        if (chosen := parse("unstructured", config)) is None:
            return self.run(x, layout, bias, pattern)
        return run_decode(lambda *_: chosen, x, layout["weight"], bias, None, rows, columns, False, streams)


def streams_of(layout: Layout) -> Streams:
    """What a layout holds beside its words."""
    return Streams(layout["offsets"], *layout["extent"].shape[2:4])


register(CudaUnstructuredKernel())
