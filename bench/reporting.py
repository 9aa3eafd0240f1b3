"""Where results go: bench/results/<device>/<name>.json, one schema for every bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparse_engine.bench.environment import device_name, environment, write_json

__all__ = ["RESULTS", "device_name", "environment", "write_results"]

RESULTS = Path(__file__).parent / "results"


def write_results(device: str, name: str, environment: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write rows whole to bench/results/<device>/<name>.json and return the path."""
    path = RESULTS / device / f"{name}.json"
    write_json(path, {"environment": environment, "rows": rows})
    return path
