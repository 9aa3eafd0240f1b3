"""Decoding speed with a fixed number of tokens, so that models are compared by their engines and not by when they stop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sparse_engine.data.pairs import Pair
from sparse_engine.data.prompt import prompt_tokens

if TYPE_CHECKING:
    from sparse_engine.evaluate.run import EvaluateSettings, Loaded

__all__ = ["decode_speed"]

_ROUNDS, _MOST_ROUNDS = 5, 20


def decode_speed(
    loaded: Loaded, pairs: Sequence[Pair], settings: EvaluateSettings, tokens: int, *, batches: Sequence[int]
) -> dict[str, dict[str, float | None]]:
    """Milliseconds per generated token and per prompt, for each batch size: the fastest of five rounds after one to warm up.

    Every round generates exactly ``tokens`` tokens after the first examples' prompts; the time of the first token stands for
    the prompt's. A token's is a difference of two times, of which a large batch's prompts are most; what disturbs a round only
    adds to it, so that differences of the fastest scatter least. Where the machine is so busy that not even twenty rounds give a
    difference above 0, a token's time is None.
    """
    positions = int(loaded.model.config.max_position_embeddings) - tokens
    found: dict[str, dict[str, float | None]] = {}
    for batch in dict.fromkeys(batches):
        some = list(pairs[:batch])
        prompts = [prompt_tokens(pair.text, loaded.tokenizer, settings.max_text_tokens, positions) for pair in some]
        prompt = total = math.inf
        for turn in range(_MOST_ROUNDS + 1):
            first, whole = _timed(loaded.model, prompts, 1), _timed(loaded.model, prompts, tokens)
            if turn > 0:
                prompt, total = min(prompt, first), min(total, whole)
            if turn >= _ROUNDS and total > prompt:
                break
        token = (total - prompt) / max(1, tokens - 1)
        found[str(batch)] = {"prompt_ms": 1e3 * prompt, "token_ms": 1e3 * token if token > 0 else None}
    return found


def _timed(model: Any, prompts: Sequence[list[int]], tokens: int) -> float:
    from transformers import GenerationConfig

    width, pad = max(map(len, prompts)), int(model.config.pad_token_id)
    ids = torch.full((len(prompts), width), pad, device=model.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=model.device)
        mask[row, width - len(prompt) :] = 1
    settings = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=pad)  # type: ignore[no-untyped-call]
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - started
