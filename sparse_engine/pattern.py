"""Sparsity patterns: N:M (N weights kept in every M consecutive input columns) and unstructured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from sparse_engine.errors import InputError

__all__ = ["GROUP_SIZES", "SparsityPattern"]

GROUP_SIZES = (2, 4, 8, 16, 32)
"""Values of M that every pruner, format and reference product accepts."""


@dataclass(frozen=True, slots=True)
class SparsityPattern:
    """Either ``n``:``m`` or an unstructured ``sparsity``; make one with :meth:`parse`, :meth:`nm` or :meth:`unstructured`.

    N:M means that N weights are *kept* in every M consecutive input columns of a row, as in "2:4" and "4:8" of
    Mishra et al. 2021 ("Accelerating Sparse Deep Neural Networks", section 3); 1:4 keeps one in four.

    Raises:
        InputError: neither or both kinds given, M not in :data:`GROUP_SIZES`, N outside 1..M-1, or a sparsity outside (0, 1).
    """

    n: int | None = None
    m: int | None = None
    sparsity: float | None = None

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            if self.n is not None or self.m is not None:
                raise InputError("a pattern is either N:M or an unstructured sparsity, not both")
            if not 0.0 < self.sparsity < 1.0:
                raise InputError(f"unstructured sparsity must lie strictly between 0 and 1, got {self.sparsity}; 0.5 removes half")
            return
        if self.n is None or self.m is None:
            raise InputError("a pattern needs both N and M (such as 2:4) or an unstructured sparsity (such as 0.5)")
        if self.m not in GROUP_SIZES:
            raise InputError(f"N:M needs M in {', '.join(map(str, GROUP_SIZES))}, got {self.n}:{self.m}")
        if not 1 <= self.n < self.m:
            raise InputError(f"N:M keeps N of M weights, so N must be 1 to {self.m - 1}, got {self.n}:{self.m}; 2:4 keeps half")

    @classmethod
    def nm(cls, n: int, m: int) -> SparsityPattern:
        return cls(n=n, m=m)

    @classmethod
    def unstructured(cls, sparsity: float) -> SparsityPattern:
        return cls(sparsity=sparsity)

    @classmethod
    def parse(cls, text: str) -> SparsityPattern:
        """Read "2:4", "4:8" or "0.5" (also "50%").

        Raises:
            InputError: ``text`` is none of these.
        """
        text = text.strip()
        if match := re.fullmatch(r"(\d{1,3}):(\d{1,3})", text):
            return cls.nm(int(match[1]), int(match[2]))
        if match := re.fullmatch(r"(\d*\.?\d+)(%?)", text):
            value = float(match[1])
            return cls.unstructured(value / 100 if match[2] else value)
        raise InputError(f"cannot read {text!r} as a sparsity pattern: give N:M such as 2:4 or 4:8, or a fraction removed such as 0.5")

    @property
    def is_nm(self) -> bool:
        return self.n is not None

    @property
    def group(self) -> tuple[int, int]:
        """(N, M) of an N:M pattern.

        Raises:
            InputError: the pattern is unstructured.
        """
        if self.n is None or self.m is None:
            raise InputError(f"{self} is unstructured and has no N:M groups")
        return self.n, self.m

    @property
    def density(self) -> float:
        """The share of weights kept (for an unstructured pattern the target)."""
        if self.sparsity is not None:
            return 1.0 - self.sparsity
        n, m = self.group
        return float(Fraction(n, m))

    def check_shape(self, shape: tuple[int, int], what: str = "weight") -> None:
        """Raise :class:`InputError` unless a (rows, columns) weight called ``what`` can carry this pattern."""
        if self.is_nm and shape[1] % self.group[1]:
            raise InputError(f"{what} has {shape[1]} input columns, which {self} cannot divide: M must divide the columns")

    def __str__(self) -> str:
        return f"{self.sparsity:g}" if self.sparsity is not None else f"{self.n}:{self.m}"
