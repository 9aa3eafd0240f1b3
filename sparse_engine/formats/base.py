"""What a packed format is: neutral tensors for one pruned linear, and how to make, check and unpack them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine import value_types
from sparse_engine.errors import CheckpointError, InputError
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern
from sparse_engine.value_types import PLAIN
from sparse_engine.value_types.base import TensorSpec, ValueType

__all__ = ["VALUE_DTYPES", "Format", "PackedWeight", "TensorSpec", "pack_bits", "stack", "unpack_bits"]

VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Types that a packed weight may have: of its plain values, of what quantised ones stand for, and of the activations it meets."""

_CHECKED_ELEMENTS = 1 << 19
"""Weights whose positions are checked at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """One pruned (rows, columns) weight in a neutral, serialisable form; kernel layouts derive from it and are never serialised.

    ``tensors`` maps the names that a checkpoint appends to the linear's name ("values", "bitmask", ...) to tensors. ``dtype`` is the
    weight's type; ``value_type`` says how its values are stored (:mod:`sparse_engine.value_types`), plain ones in ``dtype`` itself.
    """

    format: str
    version: int
    pattern: SparsityPattern
    shape: tuple[int, int]
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]
    value_type: str = PLAIN

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def dense_nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def nnz(self) -> int:
        """Number of stored values; kept slots that hold a zero count, and so do those that fill a row's last byte of int4."""
        return self.tensors["values"].numel() * value_types.get(self.value_type).slots

    def to(self, device: torch.device | str) -> PackedWeight:
        return replace(self, tensors={name: t.to(device) for name, t in self.tensors.items()})


def stack(parts: Sequence[PackedWeight]) -> PackedWeight:
    """The weight whose rows are those of ``parts``, one after the other; all of one pattern, type and number of columns."""
    first = parts[0]
    tensors = {}
    for name in first.tensors:
        pieces = [part.tensors[name] for part in parts]
        if name == "row_offsets":
            ends = [int(piece[-1]) for piece in pieces]
            starts = [sum(ends[:i]) for i in range(len(parts))]
            pieces = [pieces[0], *(piece[1:] + start for piece, start in zip(pieces[1:], starts[1:], strict=True))]
        tensors[name] = torch.cat(pieces)
    return replace(first, shape=(sum(part.shape[0] for part in parts), first.shape[1]), tensors=tensors)


class Format(ABC):
    """A packed form. One file in this package defines one format and registers an instance of it."""

    name: ClassVar[str]
    version: ClassVar[int] = 1

    @abstractmethod
    def accepts(self, pattern: SparsityPattern) -> bool:
        """Whether masks of ``pattern`` are packed in this form."""

    @abstractmethod
    def _layout(
        self, shape: tuple[int, int], pattern: SparsityPattern, slots: int, nnz: int | None
    ) -> tuple[tuple[int, ...], dict[str, TensorSpec]]:
        """Shape of ``values``, whose elements hold ``slots`` values each, and the tensors that say where each row's values lie."""

    @abstractmethod
    def _locate(self, counts: Tensor) -> dict[str, Tensor]:
        """The tensors that say where each row's values lie; ``counts`` int64 (rows,) are the value slots of each row."""

    @abstractmethod
    def _check_bits(self, packed: PackedWeight, rows: slice, keep: Tensor, counts: Tensor) -> str | None:
        """What contradicts ``keep``, the kept positions of those ``rows``, and ``counts``, the value slots of each, or None."""

    def specs(
        self, shape: tuple[int, int], pattern: SparsityPattern, dtype: torch.dtype, nnz: int | None = None, value_type: str = PLAIN
    ) -> dict[str, TensorSpec]:
        """Tensors of a packed (rows, columns) weight, known before anything is allocated.

        ``nnz`` (stored values) is needed where the pattern alone does not give it.
        """
        kind = value_types.get(value_type)
        values, located = self._layout(shape, pattern, kind.slots, nnz)
        bitmask = TensorSpec((shape[0], -(-shape[1] // 8)), torch.uint8)
        return {"values": TensorSpec(values, kind.element(dtype)), **located, "bitmask": bitmask, **kind.scale_specs(shape)}

    def pack(self, weight: Tensor, mask: Mask, name: str = "weight", value_type: str = PLAIN) -> PackedWeight:
        """Pack a (rows, columns) ``weight``; the entries that ``mask`` removes are dropped and -0.0 becomes 0.0.

        Raises:
            InputError: shapes differ, the type is not a packed one, the pattern is another format's, or a kept value is NaN or infinite.
        """
        if not self.accepts(mask.pattern):
            raise InputError(f"{name}: format {self.name} does not pack {mask.pattern}")
        if tuple(weight.shape) != mask.shape:
            raise InputError(f"{name}: weight is {tuple(weight.shape)} but its mask is {mask.shape}")
        if weight.dtype not in VALUE_DTYPES:
            raise InputError(
                f"{name}: cannot pack {weight.dtype}; convert to one of {', '.join(str(d).removeprefix('torch.') for d in VALUE_DTYPES)}"
            )
        clean = mask.apply(weight)
        if not bool(torch.isfinite(clean).all()):
            raise InputError(f"{name} holds NaN or infinite values; a packed model needs finite weights")
        kind = value_types.get(value_type)
        levels, scales = kind.quantise(clean)
        counts = mask.keep.sum(1)
        located = self._locate(_slots(counts, kind))
        shape, _ = self._layout(mask.shape, mask.pattern, kind.slots, int(_slots(counts, kind).sum()))
        values = kind.store(levels[mask.keep], counts).view(shape)
        tensors = {"values": values, **located, "bitmask": pack_bits(mask.keep), **scales}
        return PackedWeight(self.name, self.version, mask.pattern, mask.shape, weight.dtype, tensors, value_type)

    def check(self, packed: PackedWeight, name: str = "weight") -> None:
        """Validate tensors that came from outside, so that kernels may trust them.

        Raises:
            CheckpointError: a tensor is missing, has another shape or type, or the bitmask contradicts the pattern or the values,
                or a quantised value or scale is out of range.
        """
        if "values" not in packed.tensors:
            raise CheckpointError(f"{name}: tensor {name}.values is missing from the checkpoint")
        try:
            packed.pattern.check_shape(packed.shape, name)
            specs = self.specs(packed.shape, packed.pattern, packed.dtype, packed.nnz, packed.value_type)
        except InputError as error:
            raise CheckpointError(f"{name} cannot be what its checkpoint says: {error}") from error
        if missing := specs.keys() - packed.tensors.keys():
            raise CheckpointError(f"{name}: tensor {name}.{min(missing)} is missing from the checkpoint")
        for key, spec in specs.items():
            tensor = packed.tensors[key]
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise CheckpointError(f"{name}.{key} is {tensor.dtype} {tuple(tensor.shape)}, expected {spec.dtype} {spec.shape}")
        # In chunks: a whole layer's positions, a byte each, would be as large as the packed weight that is being loaded.
        kind = value_types.get(packed.value_type)
        step = max(1, _CHECKED_ELEMENTS // max(1, packed.shape[1]))
        for begin in range(0, max(1, packed.shape[0]), step):
            rows = slice(begin, begin + step)
            keep = unpack_bits(packed.tensors["bitmask"][rows], packed.shape[1])
            if problem := self._check_bits(packed, rows, keep, _slots(keep.sum(1), kind)):
                raise CheckpointError(f"{name}: {problem}")
        if problem := kind.check(packed.tensors):
            raise CheckpointError(f"{name}: {problem}")

    def keep(self, packed: PackedWeight) -> Tensor:
        """Bool (rows, columns), True at the stored positions."""
        return unpack_bits(packed.tensors["bitmask"], packed.shape[1])

    def levels(self, packed: PackedWeight) -> Tensor:
        """The stored values (nnz,) row by row: the weights themselves where they are plain, else what the scales multiply."""
        return value_types.get(packed.value_type).load(packed.tensors["values"], self.keep(packed).sum(1))

    def unpack(self, packed: PackedWeight) -> Tensor:
        """The masked dense (rows, columns) weight: bit for bit what ``Mask.apply`` gave, or what its quantised values stand for."""
        keep, kind = self.keep(packed), value_types.get(packed.value_type)
        levels = kind.load(packed.tensors["values"], keep.sum(1))
        # Levels are spread as bytes where their type has one: torch moves float8 elements by few operators.
        bits = levels.view(torch.uint8) if levels.element_size() == 1 else levels
        dense = torch.zeros(packed.shape, dtype=bits.dtype, device=bits.device).masked_scatter_(keep, bits)
        return kind.dequantise(dense.view(levels.dtype), packed.tensors, packed.dtype)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """The reference product x (..., columns) by Wᵀ: unpack, then a dense linear. Every kernel is checked against it."""
        return F.linear(x, self.unpack(packed), bias)


def _slots(counts: Tensor, kind: ValueType) -> Tensor:
    """Value slots of rows that keep ``counts`` weights each: rows are filled up to whole elements."""
    return (counts + kind.slots - 1) // kind.slots * kind.slots if kind.slots > 1 else counts


def pack_bits(keep: Tensor) -> Tensor:
    """Bool (rows, columns) to uint8 (rows, ceil(columns / 8)); bit j of byte b is column 8b + j."""
    rows, columns = keep.shape
    padded = F.pad(keep, (0, -columns % 8)).view(rows, -1, 8)
    weights = torch.tensor([1 << j for j in range(8)], dtype=torch.uint8, device=keep.device)
    return (padded.to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bitmask: Tensor, columns: int) -> Tensor:
    """Inverse of :func:`pack_bits`: uint8 (rows, ceil(columns / 8)) to bool (rows, columns)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    bits = (bitmask.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(1)[:, :columns].bool()
