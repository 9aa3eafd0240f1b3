"""How likely a model finds the reference answers: perplexity per answer token, which no decoding rule can flatter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sparse_engine.data.encode import IGNORED, AnswerCollator, encode_pairs
from sparse_engine.data.pairs import Pair
from sparse_engine.progress import Track, silent

__all__ = ["AnswerLikelihood", "answer_likelihood"]


@dataclass(frozen=True, slots=True)
class AnswerLikelihood:
    """Per example: negative log likelihood in nats summed over its answer's ``tokens``."""

    nll: list[float]
    tokens: list[int]

    @property
    def nll_per_token(self) -> float:
        return sum(self.nll) / sum(self.tokens)

    @property
    def ppl(self) -> float:
        """exp of the mean negative log likelihood per answer token."""
        return math.exp(self.nll_per_token)


def answer_likelihood(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 8,
    max_text_tokens: int = 1024,
    max_summary_tokens: int = 128,
    track: Track = silent,
) -> AnswerLikelihood:
    """Likelihood of each reference summary with its ``### End`` and end of sequence, after the study's prompt."""
    limits = {"max_text_tokens": max_text_tokens, "max_summary_tokens": max_summary_tokens}
    encoded = encode_pairs(pairs, tokenizer, positions=int(model.config.max_position_embeddings), **limits)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    collate = AnswerCollator(int(model.config.pad_token_id))
    nll, tokens = [0.0] * len(encoded), [0] * len(encoded)
    for batch in track(batches, "answer likelihood", len(batches)):
        inputs = collate([encoded[i] for i in batch])
        ids, labels = inputs["input_ids"].to(model.device), inputs["labels"][:, 1:].to(model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, logits_to_keep=inputs["logits_to_keep"], use_cache=False).logits[:, :-1]
            losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none").sum(1)
        for i, loss, count in zip(batch, losses.tolist(), (labels != IGNORED).sum(1).tolist(), strict=True):
            nll[i], tokens[i] = loss, count
    return AnswerLikelihood(nll, tokens)
