"""What a figure depends on beside the code: machine, versions, load and commit, recorded with every result."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import sparse_engine
from sparse_engine import tuning

__all__ = ["commit", "cpu_info", "device_name", "environment", "microarchitecture", "write_json"]

_ROOT = Path(__file__).resolve().parents[2]

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
        return tuning.slug(torch.cuda.get_device_name().removeprefix("NVIDIA "))
    return f"cpu-{microarchitecture()}"


def commit() -> str | None:
    """The checkout's commit; from the environment variable SPARSE_ENGINE_COMMIT where the tree is a copy without its history."""
    if given := os.environ.get("SPARSE_ENGINE_COMMIT"):
        return given
    # An installed package may lie in the folder of another project, whose commit would say nothing.
    if (git := shutil.which("git")) is None or not (_ROOT / "sparse_engine").is_dir() or not (_ROOT / "pyproject.toml").is_file():
        return None
    found = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=_ROOT)  # noqa: S603
    return found.stdout.strip() or None


def environment() -> dict[str, Any]:
    """What a figure depends on beside the code: machine, versions, threads, load, commit, and the command that ran."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join([*_program(), *(_portable(argument) for argument in sys.argv[1:])]),
        "commit": commit(),
        "cpu": cpu_info().get("model name"),
        "cpu_count": os.cpu_count(),
        "date": datetime.now(UTC).date().isoformat(),
        "cuda": torch.version.cuda,
        "driver": _driver_version() if gpu else None,
        "gpu": gpu,
        "load_average_1min": round(os.getloadavg()[0], 2),
        "microarchitecture": microarchitecture(),
        "python": platform.python_version(),
        "sparse_engine": sparse_engine.__version__,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _driver_version() -> str | None:
    """Of the GPU's driver, such as "580.159.04"; only the vendor's own tool knows it."""
    if (smi := shutil.which("nvidia-smi")) is None:
        return None
    command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()  # noqa: S603
    return found[0] if found else None


def write_json(path: Path, content: object) -> None:
    """Write ``content`` whole: the file at ``path`` is the old one or the new one at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def _program() -> list[str]:
    name = Path(sys.argv[0])
    ours = name.stem == "sparse-engine" or name.parts[-2:] == ("sparse_engine", "__main__.py")
    return ["sparse-engine"] if ours else ["python", _portable(sys.argv[0])]


def _portable(argument: str) -> str:
    """An argument as a reader could give it: the data folder by its variable, the script relative to the repository."""
    data = os.environ.get("SPARSE_ENGINE_DATA")
    if data and argument.startswith(data):
        return "$SPARSE_ENGINE_DATA" + argument.removeprefix(data)
    path = Path(argument)
    return str(path.resolve().relative_to(_ROOT)) if path.exists() and path.resolve().is_relative_to(_ROOT) else argument
