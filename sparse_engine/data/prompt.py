"""The prompt of the bill-summarisation study (Zolensky et al. 2024, "Pruning OPT For Summarization"), at training and inference."""

from __future__ import annotations

from typing import Any

from sparse_engine.errors import InputError

__all__ = ["END", "build_prompt", "extract_summary", "prompt_tokens", "render_example", "truncate", "windows"]

_HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruct: Summarize the text below.\n\n"
)
_OUTPUT = "### Output:"
END = "### End"
"""What a summary ends with."""


def truncate(text: str, tokenizer: Any, max_tokens: int) -> str:
    """The longest start of ``text`` that its first ``max_tokens`` tokens cover."""
    encoded = tokenizer(text, add_special_tokens=False, truncation=True, max_length=max_tokens, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    return text[: offsets[-1][1]] if len(offsets) >= max_tokens else text


def windows(text: str, tokenizer: Any, max_tokens: int, count: int) -> list[str]:
    """``text`` cut into consecutive pieces of ``max_tokens`` tokens, at most ``count`` of them; one empty piece of an empty text."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    starts = [offsets[first][0] for first in range(0, len(offsets), max_tokens)] or [0]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)][:count]


def build_prompt(text: str, tokenizer: Any, max_text_tokens: int = 1024) -> str:
    """The prompt up to and including ``### Output:`` and its blank line; only ``text`` is ever cut (to ``max_text_tokens`` tokens)."""
    return f"{_HEAD}{truncate(text.strip(), tokenizer, max_text_tokens)}\n\n{_OUTPUT}\n\n"


def render_example(text: str, summary: str, tokenizer: Any, max_text_tokens: int = 1024, max_summary_tokens: int = 128) -> str:
    """Prompt and answer as one training or calibration document, ending with ``### End``."""
    return f"{build_prompt(text, tokenizer, max_text_tokens)}{truncate(summary.strip(), tokenizer, max_summary_tokens)}\n\n{END}"


def prompt_tokens(text: str, tokenizer: Any, max_text_tokens: int = 1024, max_length: int | None = None) -> list[int]:
    """Token ids of :func:`build_prompt`, at most ``max_length`` of them: more text is cut, never the ``### Output:`` at the end.

    The ids are those that the prompt has with an answer behind it. Encoded alone, its last newlines could merge into one token
    that no training example has there.

    Raises:
        InputError: ``max_length`` leaves no room for any text.
    """
    while True:
        # A letter is always a token of its own start behind a newline, so dropping it leaves the prompt's ids.
        ids: list[int] = tokenizer(build_prompt(text, tokenizer, max_text_tokens) + "A", verbose=False)["input_ids"][:-1]
        if max_length is None or len(ids) <= max_length:
            return ids
        max_text_tokens = min(max_text_tokens, len(ids)) - max(1, len(ids) - max_length)
        if max_text_tokens < 1:
            raise InputError(
                f"the model leaves {max(0, max_length)} tokens for a prompt, which has no room for text; allow fewer new tokens"
            )


def extract_summary(generated: str) -> str:
    """What stands after the last ``### Output:`` (if any) and before ``### End``."""
    return generated.rpartition(_OUTPUT)[2].partition(END)[0].strip()
