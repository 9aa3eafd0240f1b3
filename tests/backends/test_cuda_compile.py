"""The disk cache of compiled kernels: what its keys tell apart, and that tuning starts no compiler for what it holds."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sparse_engine import cuda
from sparse_engine.bench import tune
from sparse_engine.errors import KernelUnavailableError
from sparse_engine.pattern import SparsityPattern

MACROS = {"M": 1, "N": 2}


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """A compiler that notes what it is asked for; the definitions of each call."""
    calls: list[tuple[str, ...]] = []

    class Program:
        def __init__(self, source: str, language: str, options: SimpleNamespace) -> None:
            assert "__global__" in source
            self.options = options

        def compile(self, kind: str) -> SimpleNamespace:
            assert kind == "cubin"
            defined = self.options.define_macro
            # An empty list is refused.
            assert defined is None or defined
            calls.append(tuple(defined or ()))
            return SimpleNamespace(code=b"machine code of " + " ".join(defined or ()).encode())

    core = ModuleType("cuda.core")
    core.Program, core.ProgramOptions = Program, lambda **fields: SimpleNamespace(**fields)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.core", core)
    monkeypatch.setattr(cuda, "_nvrtc_version", lambda: "13.0")
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    return calls


def test_a_kernel_is_compiled_once(compiled: list[tuple[str, ...]]) -> None:
    assert not cuda.is_compiled("embed.cu", "sm_90a", MACROS)
    for _ in range(2):
        assert cuda.compile_cubin("embed.cu", "sm_90a", MACROS) == b"machine code of M=1 N=2"
    assert compiled == [("M=1", "N=2")]
    assert cuda.is_compiled("embed.cu", "sm_90a", dict(reversed(MACROS.items())))


def test_a_kernel_without_macros_is_compiled(compiled: list[tuple[str, ...]]) -> None:
    assert cuda.compile_cubin("append_prompts.cu", "sm_90a", {}) == b"machine code of "
    assert compiled == [()]


def test_another_source_gpu_macro_or_toolkit_is_another_kernel(compiled: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.compile_cubin("embed.cu", "sm_90a", MACROS)
    for source, arch, macros in (("head.cu", "sm_90a", MACROS), ("embed.cu", "sm_80", MACROS), ("embed.cu", "sm_90a", {"M": 1})):
        assert not cuda.is_compiled(source, arch, macros)
    monkeypatch.setattr(cuda, "_nvrtc_version", lambda: "13.1")
    assert not cuda.is_compiled("embed.cu", "sm_90a", MACROS)
    assert len(compiled) == 1


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_without_nvrtc_nothing_is_compiled(error: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing() -> str:
        raise error("no library")

    monkeypatch.setattr(cuda, "_nvrtc_version", missing)
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    assert not cuda.is_compiled("embed.cu", "sm_90a", MACROS)
    with pytest.raises(KernelUnavailableError, match="NVRTC cannot compile embed"):
        cuda.compile_cubin("embed.cu", "sm_90a", MACROS)


def test_tuning_starts_no_process_for_what_is_compiled(compiled: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    job = ("embed.cu", "sm_90a", tuple(MACROS.items()))
    kernel = SimpleNamespace(configs=lambda problem: [("a tile",)], compilations=lambda problem, config: [job])
    monkeypatch.setattr(tune, "able", lambda problem, only: [kernel])
    started: list[int] = []

    class Pool:
        def __init__(self, workers: int, **_: object) -> None:
            started.append(workers)

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        map = staticmethod(lambda function, jobs, chunksize: map(function, jobs))

    monkeypatch.setattr(tune, "ProcessPoolExecutor", Pool)
    wanted = [tune.Bucket(SparsityPattern.parse("2:4"), torch.bfloat16, (16, 16), 1)]
    for _ in range(2):
        assert tune.compile_all(wanted, torch.device("cpu")) == []
    assert len(started) == len(compiled) == 1
