"""Text in: rows, documents and example pairs, calibration tokens, the summarisation prompt, and encoded training batches."""

from __future__ import annotations

from sparse_engine.data.calibration import calibration_tokens
from sparse_engine.data.encode import AnswerCollator, Encoded, encode_pair, encode_pairs
from sparse_engine.data.files import Rows, read_documents, read_rows
from sparse_engine.data.pairs import Pair, load_pairs
from sparse_engine.data.prompt import build_prompt, extract_summary, prompt_tokens, render_example

__all__ = [
    "AnswerCollator",
    "Encoded",
    "Pair",
    "Rows",
    "build_prompt",
    "calibration_tokens",
    "encode_pair",
    "encode_pairs",
    "extract_summary",
    "load_pairs",
    "prompt_tokens",
    "read_documents",
    "read_rows",
    "render_example",
]
