"""Layers in two kernels each: against the engine's step kernel by kernel (on a GPU), what they refuse, and how they compile (anywhere)."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_products import nvcc
from decoding import (
    assert_a_finished_row_stays,
    assert_steps_match_the_kernels_one_by_one,
    same_generation_with_and_without,
    small_opt,
)
from products import relative_error

from sparse_engine import cuda
from sparse_engine.engine.cuda import VARIABLE as STEP
from sparse_engine.engine.cuda import CudaRunner
from sparse_engine.engine.generation import VARIABLE
from sparse_engine.engine.halves import half_layers
from sparse_engine.engine.kernels import half_layers as kernels
from sparse_engine.engine.kernels.half_layers import HalfDimensions
from sparse_engine.engine.kernels.head import head_macros, head_row
from sparse_engine.engine.runner import Session, runner_for
from sparse_engine.engine.weights import DecoderWeights
from sparse_engine.errors import InputError

OPT_125M = HalfDimensions(768, 3072, 64, 4)
OPT_1_3B = HalfDimensions(2048, 8192, 64, 8)
HOPPER_SHARED = 232448


@pytest.fixture(autouse=True)
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEP, "half-layers")


@pytest.mark.parametrize("source", ["half_attention", "half_ffn", "half_end"])
@pytest.mark.parametrize("dimensions", [OPT_125M, OPT_1_3B], ids=["125m", "1.3b"])
def test_kernels_compile_and_fit_a_multiprocessor(dimensions: HalfDimensions, source: str, tmp_path: Path) -> None:
    assert dimensions.objection() is None
    macros = dimensions.macros(torch.bfloat16, 132)[source]
    assert macros["MIN_BLOCKS"] * (macros["SHARED_BYTES"] + 1024) <= HOPPER_SHARED + 1024
    nvcc("90a", f"{source}.cu", macros, tmp_path)


@pytest.mark.parametrize("width", [256, 768, 2048, 5120])
def test_the_head_compiles_and_two_blocks_fit(width: int, tmp_path: Path) -> None:
    macros = head_macros(width, torch.float16, HOPPER_SHARED)
    log = nvcc("90a", "head.cu", macros, tmp_path)
    static = max(int(count) for count in re.findall(r"(\d+) bytes smem", log))
    dynamic = macros["WARPS"] * macros["SLOTS"] * macros["ROWS"] * width * 2 + 2 * width
    assert 2 * (dynamic + static + 1024) <= HOPPER_SHARED + 1024


@pytest.mark.parametrize(
    ("source", "struct"), [("half_attention", "_AttentionParams"), ("half_ffn", "_FfnParams"), ("half_end", "_EndParams")]
)
def test_parameters_match_the_sources(source: str, struct: str) -> None:
    folder = cuda.source_folder()
    header = (folder / "include" / "half" / "input.cuh").read_text()
    for text, name, fields in (
        (header, "Input", kernels._Input._fields_),
        ((folder / f"{source}.cu").read_text(), "Params", getattr(kernels, struct)._fields_),
    ):
        found = re.search(rf"struct {name} \{{(.*?)\}};", re.sub(r"//.*", "", text), re.S)
        assert found is not None
        declared = re.findall(r"[*\s](\w+)\s*;", found[1])
        assert declared == [field for field, *_ in fields]
    assert issubclass(getattr(kernels, struct), ctypes.Structure)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden": 320}, "multiples of 256"),
        ({"ffn": 1000}, "multiples of 256"),
        ({"head_size": 128}, "heads of 128"),
        ({"hidden": 4096, "ffn": 16384}, "4096 wide"),
    ],
)
def test_dimensions_that_do_not_suit_them(change: dict[str, int], reason: str) -> None:
    assert reason in str(replace(OPT_125M, **change).objection())


@pytest.mark.gpu
@pytest.mark.parametrize("nm", ["2:4", "4:8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072, "num_attention_heads": 12},
        {"hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8192, "num_attention_heads": 32, "num_hidden_layers": 2},
    ],
    ids=["256", "768", "2048"],
)
def test_a_step_matches_the_kernels_one_by_one(nm: str, dtype: torch.dtype, sizes: dict[str, Any]) -> None:
    model = small_opt(nm, dtype=dtype, **sizes).to("cuda").eval()
    runner = runner_for(model)
    assert isinstance(runner, CudaRunner)
    assert isinstance(runner.layers, kernels.HalfLayers)
    assert_steps_match_the_kernels_one_by_one(runner, [runner.layers._sums, runner.layers._states])


@pytest.mark.gpu
def test_generation_is_the_same_with_and_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "engine")
    same_generation_with_and_without("layers", "two kernels per layer")


@pytest.mark.gpu
def test_a_finished_row_changes_nothing() -> None:
    assert_a_finished_row_stays(runner_for(small_opt("2:4").to("cuda").eval()), Session.step)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [256, 768, 2048, 5120])
@pytest.mark.parametrize("vocabulary", [1, 33, 323, 50272])
def test_the_head_by_one_row(width: int, vocabulary: int) -> None:
    generator = torch.Generator("cuda").manual_seed(width)
    weight = torch.randn(vocabulary, width, dtype=torch.bfloat16, device="cuda", generator=generator)
    x = torch.randn(1, width, dtype=torch.bfloat16, device="cuda", generator=generator)
    assert relative_error(head_row(x, weight), x.double() @ weight.double().t()) < 1e-2


@pytest.mark.gpu
def test_models_that_cannot_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for model, reason in (
        (small_opt("2:4", dtype=torch.float32), "computes in torch.float32"),
        (small_opt("2:4", num_attention_heads=2), "heads of 128"),
        (small_opt("1:4"), "neither all 2:4 nor all 4:8"),
    ):
        model = model.to("cuda").eval()
        found = half_layers(DecoderWeights.of(model))
        assert isinstance(found, str)
        assert re.search(reason, found)
        with pytest.raises(InputError, match="asks for layers in two kernels"):
            runner_for(model)
    monkeypatch.setenv(STEP, "kernels")
    runner: Any = runner_for(small_opt("2:4").to("cuda").eval())
    assert runner.layers is None
    assert runner.path(1) == "cuda graphs"
