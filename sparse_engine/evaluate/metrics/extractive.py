"""How much a summary copies: coverage, density and novel n-grams.

Grusky et al. 2018, "Newsroom: A Dataset of 1.3 Million Summaries with Diverse Extractive Strategies", section 4.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

from sparse_engine.evaluate.metrics import register
from sparse_engine.evaluate.metrics.base import Metric, MetricSettings, words

__all__ = ["fragments"]


class ExtractiveMetric(Metric):
    """``coverage``: share of the summary's words inside fragments shared with the text. ``density``: mean length of the fragment
    that a word is in. ``novel_2grams``: share of its distinct 2-grams that the text does not have. A blank summary has 0 of each."""

    name = "extractive"
    columns: ClassVar[tuple[str, ...]] = ("coverage", "density", "novel_2grams")

    def score(
        self, predictions: Sequence[str], references: Sequence[str], sources: Sequence[str], settings: MetricSettings
    ) -> dict[str, list[float]]:
        values: dict[str, list[float]] = {name: [] for name in self.columns}
        for prediction, source in zip(predictions, sources, strict=True):
            summary, text = words(prediction), words(source)
            lengths = fragments(text, summary)
            size = max(1, len(summary))
            made, known = set(pairwise(summary)), set(pairwise(text))
            values["coverage"].append(sum(lengths) / size)
            values["density"].append(sum(n * n for n in lengths) / size)
            values["novel_2grams"].append(len(made - known) / len(made) if made else 0.0)
        return values


def fragments(text: Sequence[str], summary: Sequence[str]) -> list[int]:
    """Lengths of the fragments F(A, S) that ``summary`` shares with ``text``: the longest match at each position, greedily from
    the left (figure 3 of the paper)."""
    places: dict[str, list[int]] = defaultdict(list)
    for at, word in enumerate(text):
        places[word].append(at)
    lengths: list[int] = []
    i = 0
    while i < len(summary):
        best = 0
        for j in places.get(summary[i], ()):
            n = 1
            while i + n < len(summary) and j + n < len(text) and summary[i + n] == text[j + n]:
                n += 1
            best = max(best, n)
        if best:
            lengths.append(best)
        i += max(1, best)
    return lengths


register(ExtractiveMetric())
