"""Calibration tokens: seeded windows of one length from a file or a Hub data set."""

from __future__ import annotations

import importlib
import itertools
import logging
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_engine.data.files import read_documents
from sparse_engine.data.prompt import render_example
from sparse_engine.errors import InputError

__all__ = ["HUB_SOURCES", "calibration_tokens", "windows"]

_log = logging.getLogger(__name__)

HUB_SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    # One shard by its path: what SparseGPT and Wanda sample from, and it does not depend on the repository's loading code.
    "c4": ("allenai/c4", {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}),
    "billsum": ("FiscalNote/billsum", {}),
}
"""Names that stand for a Hub data set: its repository and the arguments to load it with."""

_MOST_STREAMED = 50_000
"""Documents read from a streamed data set at most; enough for 128 long windows of C4, where some 2 % of documents are long."""


def calibration_tokens(source: str, tokenizer: Any, *, samples: int, length: int, seed: int = 0, as_prompts: bool = False) -> list[Tensor]:
    """Up to ``samples`` windows of exactly ``length`` tokens each, int64 (length,), the same for the same arguments.

    Args:
        source: a ``.txt``, ``.jsonl`` (both also ``.gz`` or ``.zst``) or ``.parquet`` file, or a name in :data:`HUB_SOURCES`.
        as_prompts: render each row that has ``summary`` as the study's prompt with its answer.

    Raises:
        InputError: the source cannot be read or reached, or has fewer tokens than one window.
    """
    if samples < 1 or length < 2:
        raise InputError(f"calibration needs at least 1 sample of at least 2 tokens, got {samples} of {length}")
    rng = random.Random(seed)  # noqa: S311 (sampling, not secrets)
    if source in HUB_SOURCES:
        rows: Iterable[dict[str, Any]] = _streamed(source, seed)
    else:
        rows = read_documents(Path(source))
        rng.shuffle(rows)
    texts = (_render(row, tokenizer) if as_prompts else str(row["text"]) for row in rows)
    return windows(texts, tokenizer, samples=samples, length=length, rng=rng, what=source)


def _render(row: dict[str, Any], tokenizer: Any) -> str:
    if not isinstance(row.get("summary"), str):
        raise InputError("calibrating on prompts needs a `summary` beside the `text` of every row")
    return render_example(row["text"], row["summary"], tokenizer)


def _streamed(source: str, seed: int) -> Iterator[dict[str, Any]]:
    repository, options = HUB_SOURCES[source]
    instead = "pass a .txt, .jsonl or .parquet file as the calibration source instead"
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise InputError(f"calibrating on {source} needs the datasets package (pip install 'sparse-engine[eval]'); or {instead}") from None
    try:
        stream = datasets.load_dataset(repository, split="train", streaming=True, **options).shuffle(seed=seed, buffer_size=1000)
        yield from itertools.islice(stream, _MOST_STREAMED)
    except InputError:
        raise
    except Exception as error:  # the client raises a dozen unrelated types for one cause: no way to the data
        raise InputError(f"cannot reach {repository} on the Hugging Face Hub ({type(error).__name__}); {instead}") from error


def windows(texts: Iterable[str], tokenizer: Any, *, samples: int, length: int, rng: random.Random, what: str = "the text") -> list[Tensor]:
    """Windows of ``length`` tokens: one at random from each document that is long enough; where these are too few, more from the
    same documents (none overlapping); then short documents joined by the end-of-sequence token.

    Raises:
        InputError: all documents together have fewer than ``length`` tokens.
    """
    first: list[Tensor] = []
    more: list[Tensor] = []
    joined: list[int] = []
    for text in texts:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if count := len(ids) // length:
            start = rng.randint(0, len(ids) - count * length)
            cuts = [torch.tensor(ids[at : at + length]) for at in range(start, start + count * length, length)]
            rng.shuffle(cuts)
            first.append(cuts[0])
            more += cuts[1 : samples + 1]
        elif len(joined) < samples * length:
            joined += [*ids, tokenizer.eos_token_id]
        if len(first) == samples:
            return first
    rng.shuffle(more)
    short = [torch.tensor(joined[at : at + length]) for at in range(0, len(joined) - length + 1, length)]
    found = (first + more + short)[:samples]
    if not found:
        raise InputError(
            f"{what} has {len(joined)} tokens, fewer than one calibration window of {length}: give more text or a smaller length"
        )
    if len(found) < samples:
        _log.warning("%s gives %d calibration windows of %d tokens, not %d", what, len(found), length, samples)
    return found
