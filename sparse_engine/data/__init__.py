"""Text in: rows and documents from files, calibration tokens, and the summarisation prompt."""

from __future__ import annotations

from sparse_engine.data.calibration import calibration_tokens
from sparse_engine.data.files import Rows, read_documents, read_rows
from sparse_engine.data.prompt import build_prompt, extract_summary, prompt_tokens, render_example

__all__ = [
    "Rows",
    "build_prompt",
    "calibration_tokens",
    "extract_summary",
    "prompt_tokens",
    "read_documents",
    "read_rows",
    "render_example",
]
