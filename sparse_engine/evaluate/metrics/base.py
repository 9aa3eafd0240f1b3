"""What a metric of summaries is."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

__all__ = ["Metric", "MetricSettings", "words"]

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class MetricSettings:
    """What metrics may need beside the texts.

    Attributes:
        bertscore_model: encoder of BERTScore, a name on the Hub or a local directory.
        bertscore_layers: the encoder's layer whose states are compared; None takes bert-score's own choice for a known name.
        device: where an encoder runs.
    """

    bertscore_model: str = "roberta-large"
    bertscore_layers: int | None = None
    device: str = "cpu"


class Metric(ABC):
    """Scores summaries, each by itself. One file in this package defines one and registers an instance.

    Attributes:
        name: what ``--metrics`` asks for.
        columns: names of the values that it gives per summary.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]

    @abstractmethod
    def score(
        self, predictions: Sequence[str], references: Sequence[str], sources: Sequence[str], settings: MetricSettings
    ) -> dict[str, list[float]]:
        """One value per summary for each of :attr:`columns`.

        Args:
            sources: the texts that were summarised, as far as the model saw them.

        Raises:
            InputError: a package or model that it needs is missing; says how to get it.
        """


def words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return _WORD.findall(text.lower())
