"""ROUGE (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries") by the rouge-score package."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_engine.errors import InputError

__all__ = ["Rouge", "rouge", "rouge_each"]

_NAMES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, slots=True)
class Rouge:
    """F measures from 0 to 1: unigrams, bigrams, longest common subsequence."""

    rouge1: float
    rouge2: float
    rougeL: float


def rouge(predictions: Sequence[str], references: Sequence[str], *, stemmer: bool = False) -> Rouge:
    """Mean over all pairs of :func:`rouge_each`."""
    scores = rouge_each(predictions, references, stemmer=stemmer)
    return Rouge(*(sum(getattr(score, name) for score in scores) / len(scores) for name in _NAMES))


def rouge_each(predictions: Sequence[str], references: Sequence[str], *, stemmer: bool = False) -> list[Rouge]:
    """The F measures of each prediction against its reference; a blank prediction scores 0.

    Raises:
        InputError: the lists differ in length or are empty, or the rouge-score package is not installed.
    """
    if len(predictions) != len(references) or not predictions:
        raise InputError(f"ROUGE needs as many predictions as references and at least one, got {len(predictions)} and {len(references)}")
    try:
        rouge_scorer = importlib.import_module("rouge_score.rouge_scorer")
    except ModuleNotFoundError:
        raise InputError("ROUGE needs the rouge-score package: pip install 'sparse-engine[eval]'") from None
    scorer = rouge_scorer.RougeScorer(_NAMES, use_stemmer=stemmer)
    scores = [scorer.score(reference, prediction) for reference, prediction in zip(references, predictions, strict=True)]
    return [Rouge(*(score[name].fmeasure for name in _NAMES)) for score in scores]
