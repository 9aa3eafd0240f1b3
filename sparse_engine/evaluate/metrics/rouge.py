"""ROUGE-1, ROUGE-2 and ROUGE-L F measures (Lin 2004) by the rouge-score package, with its stemmer off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sparse_engine.evaluate.metrics import register
from sparse_engine.evaluate.metrics.base import Metric, MetricSettings
from sparse_engine.evaluate.rouge import rouge_each


class RougeMetric(Metric):
    name = "rouge"
    columns: ClassVar[tuple[str, ...]] = ("rouge1", "rouge2", "rougeL")

    def score(
        self, predictions: Sequence[str], references: Sequence[str], sources: Sequence[str], settings: MetricSettings
    ) -> dict[str, list[float]]:
        scores = rouge_each(predictions, references)
        return {name: [getattr(score, name) for score in scores] for name in self.columns}


register(RougeMetric())
