"""Where results go: bench/results/<device>/<name>.json, one schema for every bench."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from sparse_engine.bench.environment import device_name, environment, write_json

__all__ = ["RESULTS", "device_name", "environment", "quality_options", "write_results"]

RESULTS = Path(__file__).parent / "results"


def quality_options(description: str | None, *, documents: int, samples: int) -> argparse.ArgumentParser:
    """What benches of perplexity are asked: a model, texts to calibrate and to measure on, and how much of them."""
    data = Path(os.environ.get("SPARSE_ENGINE_DATA", "."))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=data / "models" / "base-28m")
    parser.add_argument("--calibration", type=Path, default=data / "data" / "validation.jsonl.gz")
    parser.add_argument("--heldout", type=Path, default=data / "data" / "test.jsonl.gz")
    parser.add_argument("--documents", type=int, default=documents)
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def write_results(device: str, name: str, environment: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write rows whole to bench/results/<device>/<name>.json and return the path."""
    path = RESULTS / device / f"{name}.json"
    write_json(path, {"environment": environment, "rows": rows})
    return path
