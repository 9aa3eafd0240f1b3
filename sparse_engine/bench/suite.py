"""The latency suite: which products are measured, and the schema of a result, the same on every device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_engine.bench.shapes import HIDDEN, LAYERS, PATTERNS, shape_of
from sparse_engine.errors import InputError
from sparse_engine.pattern import SparsityPattern
from sparse_engine.value_types import PLAIN, all_value_types

__all__ = ["DTYPES", "FIELDS", "REGIMES", "VALUES", "Suite", "key_of", "wrong_field"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VALUES = {name: (dtype, PLAIN) for name, dtype in DTYPES.items()}
VALUES |= {name: (torch.bfloat16, name) for name in sorted(all_value_types().keys() - {PLAIN})}
"""What the results call a weight's values: its type, which is that of the activations and of the dense weight it is compared with, and how
its kept values are stored."""

REGIMES = {"decode": (1, 2, 4, 8, 16, 32, 64, 128), "prefill": (256, 512, 1024, 2048, 4096, 8192)}
"""Activation rows of a decode step, where reading the weights binds, and of prompts and training, where multiply-adds do."""

_NUMBER = (int, float)
FIELDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "layer": (str,),
    "n": (int,),
    "k": (int,),
    "m": (int,),
    "pattern": (str,),
    "values": (str,),
    "kernel": (str,),
    "us": _NUMBER,
    "dense_us": _NUMBER,
    "best_dense_us": _NUMBER,
    "cusparselt_us": (*_NUMBER, type(None)),
    "gb_per_s": _NUMBER,
    "tflops": _NUMBER,
    "limit_share": (*_NUMBER, type(None)),
    "rel_error": _NUMBER,
}
"""What every row holds: n output and k input features, m activation rows, times in µs, and the limit's share of the time: what only reading
the packed bytes takes or, where that is more, the tensor cores at their highest clock. A device may add fields of its own."""


def wrong_field(row: Mapping[str, Any]) -> str | None:
    """The first field of :data:`FIELDS` that ``row`` lacks or has in another type, or None."""
    return next((name for name, types in FIELDS.items() if name not in row or type(row[name]) not in types), None)


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row is about."""
    return tuple(row[name] for name in ("model", "layer", "n", "k", "m", "pattern", "values"))


@dataclass(frozen=True, slots=True)
class Suite:
    """All combinations of linear layers, activation rows, patterns and types.

    ``shapes`` are (out_features, in_features) of their own, in the place of the models' layers. ``seconds`` is the time for the rounds
    of one row of the table on a CPU; ``budget`` the seconds that a whole run on a GPU should take, by fewer rounds where that is short.

    Raises:
        InputError: a name is unknown or nothing is left to measure.
    """

    models: Sequence[str] = tuple(HIDDEN)
    layers: Sequence[str] = tuple(LAYERS)
    rows: Sequence[int] = REGIMES["decode"]
    patterns: Sequence[str] = tuple(PATTERNS)
    dtypes: Sequence[str] = ("bf16",)
    shapes: Sequence[tuple[int, int]] = field(default=())
    backend: str | None = None
    seconds: float = 0.5
    budget: float | None = None

    def __post_init__(self) -> None:
        known = (("models", HIDDEN), ("layers", LAYERS), ("patterns", PATTERNS), ("dtypes", VALUES))
        for name, names in known:
            for value in getattr(self, name):
                if value not in names:
                    raise InputError(f"unknown {name.removesuffix('s')} {value!r}: use {', '.join(names)}")
        if any(m < 1 for m in self.rows) or not all((self.models, self.layers, self.rows, self.patterns, self.dtypes)):
            raise InputError("a suite needs at least one model, layer, pattern, type and number of rows, each number 1 or more")
        for shape in self.shapes:
            for name in self.patterns:
                SparsityPattern.parse(PATTERNS[name]).check_shape(shape, f"shape {shape[0]}x{shape[1]}")

    def linears(self) -> Iterator[tuple[str, str, tuple[int, int]]]:
        """(model, layer, (out_features, in_features)); shapes of their own are layers of the model "custom"."""
        if self.shapes:
            yield from (("custom", f"{n}x{k}", (n, k)) for n, k in self.shapes)
        else:
            yield from ((model, layer, shape_of(model, layer)) for model in self.models for layer in self.layers)

    def __len__(self) -> int:
        """Rows of the result."""
        linears = len(self.shapes) or len(self.models) * len(self.layers)
        return linears * len(self.rows) * len(self.patterns) * len(self.dtypes)
