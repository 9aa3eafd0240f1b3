"""The native library's loading: what happens when it is missing, of another version, or asked for a level that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparse_engine import native, registry
from sparse_engine.errors import InputError
from sparse_engine.pattern import SparsityPattern

PROBLEM = registry.Problem("nm", SparsityPattern.parse("2:4"), torch.bfloat16, "cpu", 64, 64, 1)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Forgets the loaded library for one test."""
    native._load.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native._load.cache_clear()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def test_missing_library_rejects_with_a_reason(unloaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unloaded.setenv(native.LIBRARY_VARIABLE, str(tmp_path / "nowhere.so"))
    assert "does not exist" in (native.available() or "")
    assert "does not exist" in (registry.get("cpu").rejects(PROBLEM) or "")
    assert registry.select(PROBLEM).name == "reference"


def test_broken_library_rejects_with_a_reason(unloaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "broken.so"
    path.write_bytes(b"not a library")
    unloaded.setenv(native.LIBRARY_VARIABLE, str(path))
    assert "cannot be loaded" in (native.available() or "")


def test_library_of_another_version_rejects_with_a_reason(unloaded: pytest.MonkeyPatch) -> None:
    if native.available() is not None:
        pytest.skip(f"the native library cannot be used: it {native.available()}")
    native._load.cache_clear()
    unloaded.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    assert "build it again" in (native.available() or "")


def test_import_survives_a_missing_library(tmp_path: Path) -> None:
    code = "import sparse_engine; from sparse_engine import registry; print(sorted(registry.all_kernels()))"
    result = run_python(code, **{native.LIBRARY_VARIABLE: str(tmp_path / "nowhere.so")})
    assert result.returncode == 0, result.stderr
    assert "'cpu'" in result.stdout


@pytest.mark.skipif(not native._path().is_file(), reason="the native library is not built")
class TestLevels:
    def test_highest_supported_level_is_the_default(self) -> None:
        result = run_python("from sparse_engine import native; print(native.isa())", **{native.ISA_VARIABLE: ""})
        assert result.stdout.strip() == native.supported_isas()[-1]

    def test_every_supported_level_can_be_forced_by_the_environment(self) -> None:
        for level in native.supported_isas():
            result = run_python("from sparse_engine import native; print(native.isa())", **{native.ISA_VARIABLE: level})
            assert result.stdout.strip() == level

    def test_unknown_level_in_the_environment_is_named(self) -> None:
        result = run_python("from sparse_engine import native; native.available()", **{native.ISA_VARIABLE: "sse9"})
        assert result.returncode != 0
        assert "InputError: instruction-set level 'sse9' is unknown; usable here: scalar" in result.stderr

    def test_unsupported_level_is_named(self) -> None:
        missing = sorted({"scalar", "neon", "avx2", "avx512"} - set(native.supported_isas()))
        if not missing:
            pytest.skip("this machine supports every level")
        with pytest.raises(InputError, match="not supported by this machine or build"):
            native.set_isa(missing[0])

    def test_setting_a_level_takes_effect(self) -> None:
        for level in native.supported_isas():
            native.set_isa(level)
            assert native.isa() == level
        native.set_isa(None)
        assert native.isa() == native.supported_isas()[-1]

    def test_read_sums_the_words(self) -> None:
        for length in (0, 1, 7, 8, 9, 1000, 100_003):
            data = torch.arange(length)
            assert native.read(data, 2) == int(data.sum())

    def test_touching_takes_any_size(self) -> None:
        for length in (0, 1, 4096, 100_003):
            data = torch.arange(length)
            native.touch(data, 3)
            assert torch.equal(data, torch.arange(length))

    @pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
    def test_products_run_in_the_threads_that_torch_has(self) -> None:
        result = run_python(
            """
import os, torch
from sparse_engine import native
torch.set_num_threads(2)
x = torch.randn(64, 512)
x @ x.T
torch.randn(1 << 20).exp().sum()
before = len(os.listdir("/proc/self/task"))
native.dense_linear(x, torch.randn(512, 512), None, torch.empty(64, 512), 2)
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line}
print(len(os.listdir("/proc/self/task")) - before, len(runtimes))
"""
        )
        assert result.stdout.split() == ["0", "1"]
