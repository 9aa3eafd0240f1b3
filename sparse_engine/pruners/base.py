"""What a pruner is, and the selections of weights by score that pruners share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sparse_engine.errors import InputError
from sparse_engine.formats.base import VALUE_DTYPES
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern

if TYPE_CHECKING:
    from sparse_engine.calibrate import Statistics

__all__ = ["Needs", "Pruner", "keep_largest", "keep_largest_overall", "removed_count", "row_chunks"]

CHUNK_ELEMENTS = 1 << 22
"""Scores handled at once: bounds the int64 index tensors of a selection to 32 MiB each, whatever the matrix."""


class Needs(Enum):
    """The calibration statistics that a pruner reads; each holds at least what the ones before it do."""

    NOTHING = "nothing"
    INPUT_NORMS = "input norms"
    HESSIAN = "Hessian"


class Pruner(ABC):
    """Chooses which weights of one linear layer to keep. A file in this package defines one and registers an instance.

    Attributes:
        name: unique; what ``--pruner`` asks for.
        needs: the statistics that :meth:`prune` must be given.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]

    def prune(
        self, weight: Tensor, statistics: Statistics | None, pattern: SparsityPattern, *, layer: str = "weight"
    ) -> tuple[Tensor, Mask]:
        """Prune ``weight`` (rows, columns) = (out, in); it is not changed.

        Args:
            statistics: of this layer's inputs; may be None, and is not read, where ``needs`` is NOTHING.
            layer: what error messages call the weight.

        Returns:
            The pruned weight in the type of ``weight``, removed entries exactly +0.0, and its mask.

        Raises:
            InputError: the weight is not a finite 2-D matrix of a packed type, the pattern does not divide it, or the
                statistics are missing, empty, not finite, of another kind or of another number of columns.
        """
        if weight.dim() != 2 or weight.dtype not in VALUE_DTYPES or not weight.numel():
            names = ", ".join(str(d).removeprefix("torch.") for d in VALUE_DTYPES)
            raise InputError(f"{layer}: cannot prune {weight.dtype} of shape {tuple(weight.shape)}; give a 2-D weight of {names}")
        pattern.check_shape((weight.shape[0], weight.shape[1]), layer)
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"{layer} holds NaN or infinite values; only finite weights can be pruned")
        if self.needs is not Needs.NOTHING:
            if statistics is None:
                raise InputError(f"{layer}: pruner {self.name} needs the {self.needs.value} of calibration data, and got no statistics")
            if statistics.columns != weight.shape[1]:
                raise InputError(f"{layer} has {weight.shape[1]} input columns but its statistics have {statistics.columns}")
        pruned, keep = self._prune(weight, statistics, pattern)
        mask = Mask(pattern, keep)
        return mask.apply(pruned.to(weight.dtype)), mask

    @abstractmethod
    def _prune(self, weight: Tensor, statistics: Statistics | None, pattern: SparsityPattern) -> tuple[Tensor, Tensor]:
        """The new weight (any float type, removed entries not yet zeroed) and the bool keep mask, both (rows, columns)."""


def removed_count(sparsity: float, total: int) -> int:
    """How many of ``total`` weights an unstructured sparsity removes."""
    return round(sparsity * total)


def row_chunks(scores: Tensor) -> Iterator[slice]:
    """Slices of rows of ``scores`` (rows, columns), each of at most :data:`CHUNK_ELEMENTS` scores or one row."""
    step = max(1, CHUNK_ELEMENTS // max(1, scores.shape[1]))
    for start in range(0, scores.shape[0], step):
        yield slice(start, start + step)


def keep_largest(scores: Tensor, n: int, m: int) -> Tensor:
    """Bool (rows, columns), True at the ``n`` largest of every ``m`` consecutive scores of a row; of equals the lower column is kept."""
    keep = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for rows in row_chunks(scores):
        part = scores[rows]
        order = torch.sort(part.reshape(-1, m), dim=-1, descending=True, stable=True).indices
        chosen = torch.zeros(order.shape, dtype=torch.bool, device=scores.device)
        keep[rows] = chosen.scatter_(1, order[:, :n], True).view(part.shape)
    return keep


def keep_largest_overall(scores: Tensor, count: int) -> Tensor:
    """Bool (rows, columns), True at the ``count`` largest of all non-negative ``scores``; of equals the first in row-major order are kept.

    The threshold is found exactly by a radix search: non-negative floats order as their bits do, so two histograms of 16
    bits each name it without sorting or indexing the whole matrix.
    """
    keep = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if count <= 0:
        return keep
    chunks = list(row_chunks(scores))

    def bits(rows: slice) -> Tensor:
        # abs() turns -0.0, whose bits are those of a negative integer, into 0.0.
        return scores[rows].float().abs().contiguous().view(torch.int32)

    def histogram(digits: Callable[[slice], Tensor]) -> Tensor:
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=scores.device)
        for rows in chunks:
            counts += torch.bincount(digits(rows).flatten(), minlength=1 << 16)
        return counts

    high, above = _bucket(histogram(lambda rows: bits(rows) >> 16), 0, count)
    low, above = _bucket(histogram(lambda rows: _low_bits(bits(rows), high)), above, count)
    threshold = (high << 16) | low
    spare = count - above
    for rows in chunks:
        part = bits(rows)
        tied = part == threshold
        rank = tied.flatten().cumsum(0).view(tied.shape)
        keep[rows] = (part > threshold) | (tied & (rank <= spare))
        spare -= min(spare, int(rank[-1, -1]))
    return keep


def _low_bits(bits: Tensor, high: int) -> Tensor:
    return bits[(bits >> 16) == high] & 0xFFFF


def _bucket(histogram: Tensor, above: int, count: int) -> tuple[int, int]:
    """The bucket that holds the ``count``-th largest score, and how many scores lie above that bucket.

    ``above`` is how many larger ones the histogram leaves out.
    """
    from_top = histogram.flip(0).cumsum(0) + above
    index = int((from_top < count).sum())
    bucket = len(histogram) - 1 - index
    return bucket, int(from_top[index]) - int(histogram[bucket])
