"""Pairs of a document and its summary: BillSum from the Hub split as in the study, or any local JSONL or Parquet file."""

from __future__ import annotations

import importlib
import logging
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_engine.data.files import read_raw_rows
from sparse_engine.errors import InputError

__all__ = ["BILLSUM", "STUDY_SIZES", "Pair", "load_pairs"]

_log = logging.getLogger(__name__)

BILLSUM = "FiscalNote/billsum"

STUDY_SIZES = {"train": 5000, "validation": 100, "test": 100}
"""Examples of each split in the study (Zolensky et al. 2024)."""

_BILLSUM_SPLITS = {"train": "train", "validation": "ca_test", "test": "test"}
"""The study's names: its 'validation' rows are California bills, out of the training distribution; its 'test' rows are US bills."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One example. ``id`` is the row's own ``bill_id`` or ``id`` where it has one, else its number in the source."""

    id: str
    text: str
    summary: str
    title: str = ""


def load_pairs(
    source: str,
    split: str = "train",
    *,
    limit: int | None = None,
    fewer: bool = False,
    seed: int = 0,
    text_column: str = "text",
    summary_column: str = "summary",
) -> list[Pair]:
    """Examples of ``source``: "billsum", or a ``.jsonl`` (also ``.gz``, ``.zst``) or ``.parquet`` file.

    Rows without a text or with an empty summary are left out, and how many is logged.

    Args:
        split: "train", "validation" or "test"; chooses the part of BillSum, and says nothing about a file.
        limit: take this many rows, chosen at random by ``seed`` and kept in the source's order; default: the study's size
            of the split for BillSum, every row of a file.
        fewer: whether a source of fewer rows than ``limit`` goes without a warning.

    Raises:
        InputError: the source cannot be read or reached, has no such column, or no row is usable.
    """
    if limit is not None and limit < 1:
        raise InputError(f"cannot take {limit} examples of {source}: give at least 1")
    if source == "billsum":
        if split not in _BILLSUM_SPLITS:
            raise InputError(f"BillSum has no split {split!r} here: use {', '.join(_BILLSUM_SPLITS)}")
        rows = _billsum(split)
        limit = limit or STUDY_SIZES[split]
    else:
        rows = read_raw_rows(Path(source))
    pairs = _pairs(rows, source, text_column, summary_column)
    if limit is not None and limit < len(pairs):
        rng = random.Random(seed)  # noqa: S311 (sampling, not secrets)
        pairs = [pairs[i] for i in sorted(rng.sample(range(len(pairs)), limit))]
    elif limit is not None and limit > len(pairs) and not fewer:
        _log.warning("%s has %d usable examples, not %d", source, len(pairs), limit)
    return pairs


def _pairs(rows: Iterable[Mapping[str, Any]], source: str, text_column: str, summary_column: str) -> list[Pair]:
    pairs: list[Pair] = []
    columns: set[str] = set()
    number = without_text = without_summary = 0
    for number, row in enumerate(rows, 1):
        columns |= row.keys()
        text, summary, title = row.get(text_column), row.get(summary_column), row.get("title")
        if not isinstance(text, str) or not text.strip():
            without_text += 1
        elif not isinstance(summary, str) or not summary.strip():
            without_summary += 1
        else:
            name = row.get("bill_id") or row.get("id") or number
            pairs.append(Pair(str(name), text, summary, title if isinstance(title, str) else ""))
    if number and (missing := [column for column in (text_column, summary_column) if column not in columns]):
        raise InputError(
            f"{source} has no column {' and no column '.join(map(repr, missing))}; it has {', '.join(sorted(columns))}: "
            "name the right ones with --text-column and --summary-column"
        )
    if not pairs:
        raise InputError(
            f"{source} has no usable examples: of {number} rows {without_text} have an empty {text_column!r} "
            f"and {without_summary} an empty {summary_column!r}"
        )
    if without_text or without_summary:
        _log.warning("%s: left out %d rows without text and %d without a summary", source, without_text, without_summary)
    return pairs


def _billsum(split: str) -> Iterable[Mapping[str, Any]]:
    instead = "pass a local .jsonl or .parquet file with text and summary instead"
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise InputError(f"BillSum needs the datasets package (pip install 'sparse-engine[eval]'); or {instead}") from None
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(BILLSUM, split=_BILLSUM_SPLITS[split])
    except Exception as error:  # the client raises a dozen unrelated types for one cause: no way to the data
        raise InputError(f"cannot reach {BILLSUM} on the Hugging Face Hub ({type(error).__name__}); {instead}") from error
    return rows
