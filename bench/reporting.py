"""Where results go and what is recorded of the machine: bench/results/<device>/<name>.json, one schema for every bench."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import sparse_engine

RESULTS = Path(__file__).parent / "results"

# Family, model ranges of the common x86-64 server and desktop cores, from the vendors' CPUID documentation.
_AMD = {(0x17, range(0x30, 0x100)): "zen2", (0x19, range(0x00, 0x10)): "zen3", (0x19, range(0x20, 0x60)): "zen3"}
_AMD |= {(0x19, range(0x10, 0x20)): "zen4", (0x19, range(0x60, 0xB0)): "zen4", (0x1A, range(0x100)): "zen5"}
_INTEL = {0x55: "skylake-sp", 0x6A: "icelake-sp", 0x8F: "sapphirerapids", 0xCF: "emeraldrapids", 0xAD: "graniterapids"}


def cpu_info() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return dict(re.findall(r"^([^\n:\t]+?)\s*:\s*(.*)$", text.split("\n\n")[0], re.MULTILINE))


def microarchitecture() -> str:
    """The processor's core by name ("zen3"), or its architecture where it is not in the table."""
    info = cpu_info()
    family, model = int(info.get("cpu family", 0)), int(info.get("model", 0))
    if info.get("vendor_id") == "AuthenticAMD":
        for (known, models), name in _AMD.items():
            if family == known and model in models:
                return name
    if info.get("vendor_id") == "GenuineIntel" and family == 6 and model in _INTEL:
        return _INTEL[model]
    return platform.machine()


def device_name() -> str:
    """Folder of this machine's results: the GPU where there is one, else "cpu-<microarchitecture>"."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().removeprefix("NVIDIA ").lower().replace(" ", "-")
    return f"cpu-{microarchitecture()}"


def commit() -> str | None:
    """The checkout's commit; from the environment variable SPARSE_ENGINE_COMMIT where the tree is a copy without its history."""
    if given := os.environ.get("SPARSE_ENGINE_COMMIT"):
        return given
    if (git := shutil.which("git")) is None:
        return None
    found = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=RESULTS.parent)  # noqa: S603
    return found.stdout.strip() or None


def environment() -> dict[str, Any]:
    """What a figure depends on beside the code: machine, versions, threads, load, commit, and the command that ran."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(["python", *(_portable(argument) for argument in sys.argv)]),
        "commit": commit(),
        "cpu": cpu_info().get("model name"),
        "cpu_count": os.cpu_count(),
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": gpu,
        "load_average_1min": round(os.getloadavg()[0], 2),
        "microarchitecture": microarchitecture(),
        "python": platform.python_version(),
        "sparse_engine": sparse_engine.__version__,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_results(device: str, name: str, environment: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write rows whole to bench/results/<device>/<name>.json and return the path."""
    path = RESULTS / device / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    temporary.replace(path)
    return path


def _portable(argument: str) -> str:
    """An argument as a reader could give it: the data folder by its variable, the script relative to the repository."""
    data = os.environ.get("SPARSE_ENGINE_DATA")
    if data and argument.startswith(data):
        return "$SPARSE_ENGINE_DATA" + argument.removeprefix(data)
    path = Path(argument)
    root = RESULTS.parent.parent.resolve()
    return str(path.resolve().relative_to(root)) if path.exists() and path.resolve().is_relative_to(root) else argument
