"""The embedded summariser (7M parameters, trained on US bills), example bills, and its 2:4 form."""

from __future__ import annotations

from pathlib import Path

import torch

import sparse_engine
from sparse_engine.convert import ConvertReport, convert
from sparse_engine.data.files import Rows, read_rows
from sparse_engine.pattern import SparsityPattern
from sparse_engine.progress import Track, silent

__all__ = ["CHECKPOINT", "PATTERN", "PRUNER", "bills", "pack"]

_ASSETS = Path(sparse_engine.__file__).parent / "assets"
CHECKPOINT = _ASSETS / "summ-7m"
PATTERN = SparsityPattern.nm(2, 4)
PRUNER = "sparsegpt"


def bills() -> Rows:
    """The example bills, written for this package: ``bill_id``, ``title``, ``text`` and a reference ``summary`` each."""
    return read_rows(_ASSETS / "bills.jsonl")


def pack(out: Path, *, track: Track = silent) -> ConvertReport:
    """Prune the embedded summariser to 2:4 by SparseGPT and write it packed to ``out``.

    Calibration text is the study's prompt with each example bill, followed by the summary that the dense summariser itself
    writes for it (the reference summaries are not used): with prompts alone the statistics miss what summaries look like.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    texts = read_rows(_ASSETS / "calibration.jsonl").rows
    tokens = [torch.tensor(tokenizer(row["text"])["input_ids"]) for row in texts]
    made = {"calibration": {"source": "example bills with the dense model's summaries", "samples": len(tokens)}}
    return convert(CHECKPOINT, out, pattern=PATTERN, pruner=PRUNER, calibration=tokens, provenance=made, track=track)
