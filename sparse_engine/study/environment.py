"""What a figure depends on beside the recipe: machine and versions."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["environment"]

_PACKAGES = ("sparse-engine", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "rouge-score", "bert-score")


def environment() -> dict[str, Any]:
    """Device, processor, threads, load, date, the commit that the variable SPARSE_ENGINE_COMMIT names, and package versions."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": os.environ.get("SPARSE_ENGINE_COMMIT"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return match[1] if match else platform.processor()
