"""Measures that blank outputs and loops cannot inflate: blank share, repeated 4-grams, and length against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sparse_engine.evaluate.metrics import register
from sparse_engine.evaluate.metrics.base import Metric, MetricSettings, words

_N = 4


class CoherenceMetric(Metric):
    """``blank``: 1 for a summary without a word. ``repeated_4grams``: share of its 4-grams that are repetitions of an earlier one.
    ``length_ratio``: its words over the reference's."""

    name = "coherence"
    columns: ClassVar[tuple[str, ...]] = ("blank", "repeated_4grams", "length_ratio")

    def score(
        self, predictions: Sequence[str], references: Sequence[str], sources: Sequence[str], settings: MetricSettings
    ) -> dict[str, list[float]]:
        made = [words(prediction) for prediction in predictions]
        wanted = [words(reference) for reference in references]
        return {
            "blank": [float(not m) for m in made],
            "repeated_4grams": [_repeated(m) for m in made],
            "length_ratio": [len(m) / max(1, len(w)) for m, w in zip(made, wanted, strict=True)],
        }


def _repeated(tokens: list[str]) -> float:
    grams = [tuple(tokens[i : i + _N]) for i in range(len(tokens) - _N + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


register(CoherenceMetric())
