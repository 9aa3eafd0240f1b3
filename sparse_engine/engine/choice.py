"""How the next token is chosen: the settings of transformers' logits processors that run on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as processors

from sparse_engine.engine.kernels import DecodeState, advance, greedy, penalise, sample

__all__ = ["Choice"]


@dataclass(frozen=True, slots=True)
class Choice:
    """Greedy, or a draw after temperature, top-k and top-p; before both, the penalties.

    Attributes:
        skips_padding: the repetition penalty does not see the padding in front of a prompt.
        least: a row that holds fewer tokens than this, prompt and padding included, cannot end at an EOS token.
    """

    draws: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    skips_padding: bool = False
    least: int = 0

    @classmethod
    def of(cls, found: Any, *, draws: bool, padding: Sequence[int]) -> Choice | str:
        """The choice that a list of transformers' processors stands for, or which of them the engine does not have.

        ``padding`` is that in front of each prompt.
        """
        choice = cls(draws=draws)
        for processor in found:
            match processor:
                case processors.RepetitionPenaltyLogitsProcessor(penalty=penalty) if (skips := _skips(processor, padding)) is not None:
                    choice = replace(choice, repetition_penalty=float(penalty), skips_padding=skips)
                case processors.NoRepeatNGramLogitsProcessor(ngram_size=size):
                    choice = replace(choice, no_repeat_ngram_size=int(size))
                case processors.MinLengthLogitsProcessor(min_length=least):
                    choice = replace(choice, least=max(choice.least, int(least)))
                case processors.MinNewTokensLengthLogitsProcessor(min_new_tokens=new, prompt_length_to_skip=prompt):
                    choice = replace(choice, least=max(choice.least, int(new) + int(prompt)))
                case processors.TemperatureLogitsWarper(temperature=temperature):
                    choice = replace(choice, temperature=float(temperature))
                case processors.TopKLogitsWarper(top_k=top_k, filter_value=value) if value == -torch.inf:
                    choice = replace(choice, top_k=int(top_k))
                case processors.TopPLogitsWarper(top_p=top_p, min_tokens_to_keep=1, filter_value=value) if value == -torch.inf:
                    choice = replace(choice, top_p=float(top_p))
                case _:
                    return f"the logits processor {type(processor).__name__}"
        return choice

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1.0 or self.no_repeat_ngram_size > 0

    def take(self, logits: Tensor, state: DecodeState) -> None:
        """Choose from ``logits`` (B, V) and advance ``state``, without waiting for the device."""
        scores = logits
        if self.penalises:
            scores = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
            settings = {"repetition_penalty": self.repetition_penalty, "no_repeat_ngram_size": self.no_repeat_ngram_size}
            penalise(logits, state.history, state.filled, scores, **settings)  # type: ignore[arg-type]
        if self.least and state.eos.numel():
            scores = scores.float() if scores is not logits else logits.float().clone()
            early = (state.filled < self.least)[:, None]
            scores.index_copy_(1, state.eos, scores[:, state.eos].masked_fill(early, -torch.inf))
        if not self.draws:
            greedy(scores, state)
            return
        chosen = torch.empty_like(state.tokens)
        sample(scores.float(), chosen, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        advance(state, chosen)


def _skips(processor: Any, padding: Sequence[int]) -> bool | None:
    """Whether the penalty ignores exactly the padding; None where it ignores something else. Before transformers 5.20 it never did."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if ignored is None or (isinstance(ignored, int) and ignored == 0):
        return False
    return True if isinstance(ignored, Tensor) and ignored.tolist() == list(padding) else None
