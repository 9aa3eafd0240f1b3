"""Training examples as token ids: the study's prompt with its answer, and batches in which the answer alone carries labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from sparse_engine.data.pairs import Pair
from sparse_engine.data.prompt import END, prompt_tokens, truncate, windows
from sparse_engine.errors import InputError

__all__ = ["IGNORED", "AnswerCollator", "Encoded", "encode_pair", "encode_pairs"]

IGNORED = -100
"""Label of a position that carries no loss, as torch's cross-entropy reads it."""


class Encoded(TypedDict):
    """Prompt and answer as one sequence of ids; the answer starts at position ``answer``."""

    input_ids: list[int]
    answer: int


def encode_pair(pair: Pair, tokenizer: Any, *, max_text_tokens: int = 1024, max_summary_tokens: int = 128, positions: int) -> Encoded:
    """The prompt, the summary cut to ``max_summary_tokens``, ``### End`` and the end-of-sequence token, in at most ``positions`` ids.

    Only the text, and then the summary, is ever cut: ``### Output:`` and ``### End`` always stay.

    Raises:
        InputError: ``positions`` leaves no room for any text.
    """
    summary = truncate(pair.summary.strip(), tokenizer, max_summary_tokens)
    # Encoded apart from the prompt, as generation sees it: prompt_tokens gives the ids that a prompt has before an answer.
    answer: list[int] = tokenizer(f"{summary}\n\n{END}", add_special_tokens=False, verbose=False)["input_ids"]
    answer.append(tokenizer.eos_token_id)
    if len(answer) >= positions:
        raise InputError(f"a summary of {len(answer)} tokens has no room in {positions} positions: lower --max-summary-tokens")
    prompt = prompt_tokens(pair.text, tokenizer, max_text_tokens, positions - len(answer))
    return Encoded(input_ids=prompt + answer, answer=len(prompt))


def encode_pairs(
    pairs: Iterable[Pair], tokenizer: Any, *, text_windows: int = 1, max_text_tokens: int = 1024, **limits: int
) -> list[Encoded]:
    """:func:`encode_pair` of each, and of at most ``text_windows`` consecutive windows of each text."""
    limits["max_text_tokens"] = max_text_tokens
    if text_windows > 1:
        pairs = (replace(p, text=part) for p in pairs for part in windows(p.text.strip(), tokenizer, max_text_tokens, text_windows))
    return [encode_pair(pair, tokenizer, **limits) for pair in pairs]


@dataclass(frozen=True, slots=True)
class AnswerCollator:
    """Batches of :class:`Encoded`, padded on the right, whose output head runs over the answers' columns alone.

    A batch holds ``input_ids`` (B, T); ``lengths`` (B,); ``logits_to_keep`` K, the number of last columns from the one
    before the first answer's start on; and ``labels`` (B, K), the ids of those columns where they belong to an answer, else
    :data:`IGNORED`. No attention mask: padding stands behind everything that attends causally, so leaving it out changes no
    real position, and attention runs its fastest path.

    Args:
        all_positions: keep the logits of every column (K = T), for a loss over the prompt as well.
    """

    pad_token_id: int
    all_positions: bool = False

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Any]:
        width = max(len(example["input_ids"]) for example in examples)
        first = 0 if self.all_positions else min(example["answer"] for example in examples) - 1
        ids = torch.full((len(examples), width), self.pad_token_id)
        labels = torch.full((len(examples), width), IGNORED)
        for row, example in enumerate(examples):
            tokens = torch.tensor(example["input_ids"])
            ids[row, : len(tokens)] = tokens
            labels[row, example["answer"] : len(tokens)] = tokens[example["answer"] :]
        lengths: Tensor = torch.tensor([len(example["input_ids"]) for example in examples])
        return {"input_ids": ids, "labels": labels[:, first:].contiguous(), "lengths": lengths, "logits_to_keep": width - first}
