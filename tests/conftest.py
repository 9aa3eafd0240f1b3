"""Fixtures that many test files share: where real data lies, tiny OPT checkpoints, and what a GPU test needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import make_tiny_opt
from command_line import Result

# Triton decides at its own import whether kernels are interpreted, and other packages import it when they find it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real data and models, from the environment variable SPARSE_ENGINE_DATA."""
    if not (path := os.environ.get("SPARSE_ENGINE_DATA")):
        pytest.skip("SPARSE_ENGINE_DATA does not name a folder with real data and models")
    return Path(path)


@pytest.fixture(scope="session")
def tiny_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense pre-norm OPT checkpoint, as all published sizes but one are. Shared by the session: do not write into it."""
    return make_tiny_opt(tmp_path_factory.mktemp("checkpoints") / "tiny-opt")


@pytest.fixture(scope="session")
def tiny_opt_350m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like OPT-350m: post-norm, no final layer norm, embeddings of half the width with project_in and project_out."""
    return make_tiny_opt(tmp_path_factory.mktemp("checkpoints") / "tiny-opt-350m", do_layer_norm_before=False, word_embed_proj_dim=32)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command line in an empty working directory."""
    from sparse_engine.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        assert isinstance(stopped.value.code, int)
        return Result(stopped.value.code, *capfd.readouterr())

    return run
