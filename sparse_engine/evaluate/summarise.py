"""Summaries of bills by a model fine-tuned on the study's prompt, generated greedily, with the time that each took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_engine.data.prompt import END, extract_summary, prompt_tokens
from sparse_engine.progress import Track, silent

__all__ = ["MAX_NEW_TOKENS", "Summary", "summarise", "summarise_many"]

MAX_NEW_TOKENS = 128
"""Most tokens of a summary in the study."""

_END_TOKENS = 8
"""Newest tokens in which the end mark is looked for; it is at most as many bytes long."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One summary: its ``text``, the generated ``tokens``, seconds until the first of them and seconds for the rest."""

    text: str
    tokens: tuple[int, ...]
    prompt_seconds: float
    decode_seconds: float


class _EndMark:
    """Stops generation at ``### End`` and notes when the first token came."""

    def __init__(self, tokenizer: Any, prompt_length: int) -> None:
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.first: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.first is None:
            self.first = time.perf_counter()
        newest = input_ids[0, max(self.prompt_length, input_ids.shape[1] - _END_TOKENS) :]
        return torch.tensor([END in self.tokenizer.decode(newest)], device=input_ids.device)


def summarise(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_text_tokens: int = 1024,
    track: Track = silent,
) -> list[Summary]:
    """Summarise each of ``texts``, one at a time. A text is cut to ``max_text_tokens`` tokens, and further where the model's
    positions would not hold prompt and summary; the prompt's end is never cut.

    Raises:
        InputError: the model has too few positions for any text beside the prompt and ``max_new_tokens``.
    """
    most = model.config.max_position_embeddings - max_new_tokens
    return [
        _one(model, tokenizer, prompt_tokens(t, tokenizer, max_text_tokens, most), max_new_tokens)
        for t in track(texts, "summarising", len(texts))
    ]


def summarise_many(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_text_tokens: int = 1024,
    track: Track = silent,
) -> list[tuple[str, int]]:
    """As :func:`summarise`, ``batch`` texts at a time (None: as many as the device bears): text and number of tokens of each summary.

    Finished summaries make room for waiting texts at once (:mod:`sparse_engine.engine.many`).

    Raises:
        InputError: the model has too few positions, or is not one that the engine runs.
    """
    from sparse_engine.engine.many import generate_many

    most = model.config.max_position_embeddings - max_new_tokens
    prompts = [prompt_tokens(text, tokenizer, max_text_tokens, most) for text in texts]

    def ended(tokens: list[int]) -> int | None:
        if END not in tokenizer.decode(tokens):
            return None
        return next(count for count in range(1, len(tokens) + 1) if END in tokenizer.decode(tokens[:count]))

    made = generate_many(model, prompts, max_new_tokens=max_new_tokens, batch=batch, stop=ended, track=track)
    return [(extract_summary(tokenizer.decode(tokens, skip_special_tokens=True)), len(tokens)) for tokens in made]


def _one(model: Any, tokenizer: Any, prompt: list[int], max_new_tokens: int) -> Summary:
    from transformers import GenerationConfig, StoppingCriteriaList

    end = _EndMark(tokenizer, len(prompt))
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id
    )
    ids = torch.tensor([prompt], device=model.device)
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings, stopping_criteria=StoppingCriteriaList([end])
        )
    finished = time.perf_counter()
    tokens = tuple(output[0, len(prompt) :].tolist())
    first = end.first if end.first is not None else finished
    return Summary(extract_summary(tokenizer.decode(tokens, skip_special_tokens=True)), tokens, first - started, finished - first)
