"""Runs scripts under compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Racecheck takes an arrival at a barrier for what orders that lane's accesses, and not those of the lanes that met it before: it reported
# those of the other 31 as races, each of them and none of the arriving one's.
_EVERY_LANE = """
from sparse_engine.backends import cuda_row_stream
from sparse_engine.backends.cuda_prefill import wgmma
_macros, _all_macros = cuda_row_stream.StreamRow.macros, wgmma.PrefillSource.all_macros
cuda_row_stream.StreamRow.macros = lambda row, element: _macros(row, element) | {"EVERY_LANE_ARRIVES": 1}
wgmma.PrefillSource.all_macros = lambda source, tile, element: (*_all_macros(source, tile, element), ("EVERY_LANE_ARRIVES", 1))
"""


def run_clean(tool: str, kernels: tuple[str, ...], script: str, *arguments: str, **environment: str) -> str:
    """What a Python script prints under compute-sanitizer, whose complaints about ``kernels`` (parts of names) fail the test.

    The script may import the tests' helpers. ``environment`` is added to that of the test.
    """
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer (CUDA toolkit) is not installed")
    # Kernels of the libraries are the libraries' affair. Racecheck has to see them all the same: where it leaves cuBLAS's kernels for
    # Hopper out, they fail with an illegal address.
    options = ["--error-exitcode", "9", *(argument for name in kernels for argument in ("--kernel-name", f"kns={name}"))]
    if tool == "racecheck":
        script = _EVERY_LANE + script
    command = [sanitizer, "--tool", tool, *(options if tool != "racecheck" else ()), sys.executable, "-c", script, *arguments]
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))} | environment
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]
    if tool == "racecheck":
        assert "RACECHECK SUMMARY" in found.stdout, found.stdout[-3000:]
        raced = re.findall(r"(?:Race reported between|and) \w+ access at (\S+?)\+0x", found.stdout)
        assert not {name for name in raced if any(part in name for part in kernels)}, found.stdout[-3000:]
    return found.stdout
