"""The decode step in one kernel: against the engine's step kernel by kernel (on a GPU), what it refuses, and how it compiles (anywhere)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_products import nvcc
from decoding import admitted, assert_a_finished_row_stays, assert_same_step, copied, same_generation_with_and_without, small_opt
from products import relative_error
from transformers import OPTForCausalLM
from transformers.models.opt.configuration_opt import OPTConfig

from sparse_engine import SparseOPTForCausalLM, cuda
from sparse_engine.engine.cuda import VARIABLE as STEP
from sparse_engine.engine.cuda import CudaRunner
from sparse_engine.engine.generation import VARIABLE
from sparse_engine.engine.kernels.decode_model import Dimensions, WholeStep, _Params
from sparse_engine.engine.kernels.layer_tensors import LayerTensors
from sparse_engine.engine.runner import Runner, runner_for
from sparse_engine.engine.weights import DecoderWeights
from sparse_engine.engine.whole import whole_step
from sparse_engine.errors import InputError


@pytest.fixture(autouse=True)
def one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEP, "one-kernel")


OPT_125M = Dimensions(768, 3072, 64, 12, 50272, 4)
OPT_6_7B = Dimensions(4096, 16384, 128, 32, 50272, 8)
HOPPER_SHARED = 232448


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dimensions", [OPT_125M, OPT_6_7B], ids=["125m", "6.7b"])
def test_it_compiles_and_fits_a_multiprocessor(dimensions: Dimensions, int8: bool, tmp_path: Path) -> None:
    assert dimensions.objection(132, HOPPER_SHARED) is None
    slots = dimensions.slots(132, HOPPER_SHARED)
    log = nvcc("90a", "decode_model.cu", WholeStep.macros_for(dimensions, torch.bfloat16, 132, HOPPER_SHARED, int8=int8), tmp_path)
    static = max(int(count) for count in re.findall(r"(\d+) bytes smem", log))
    assert slots * 4608 + dimensions.rest_bytes(132) + static <= HOPPER_SHARED


def test_a_cubin_depends_on_every_header() -> None:
    include, files = cuda.source_folder() / "include", cuda._files_of("decode_model.cu")
    reached = {files[0]}
    while found := {include / name for file in reached for name in re.findall(r'#include "(.+)"', file.read_text())} - reached:
        reached |= found
    assert reached <= set(files)


def test_parameters_match_the_source() -> None:
    source = re.sub(r"//.*", "", (cuda.source_folder() / "include" / "step" / "model.cuh").read_text())
    layer, params = (re.search(rf"struct {struct} \{{(.*?)\}};", source, re.S) for struct in ("Layer", "Params"))
    assert layer is not None
    assert params is not None
    assert re.findall(r"(\w+)\[(\d)\];", layer[1]) == [("weight", "4"), ("bias", "4"), ("scale", "2"), ("shift", "2")]
    order = "qkv out fc1 fc2 qkv_bias out_bias fc1_bias fc2_bias attention_scale ffn_scale attention_shift ffn_shift"
    assert list(LayerTensors.__dataclass_fields__) == order.split()
    declared = [name for line in params[1].split(";") for name in re.findall(r"[*\s](\w+)\s*(?:,|$)", line.strip())]
    assert declared == [name for name, *_ in _Params._fields_]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden": 320}, "multiples of 256"),
        ({"ffn": 1000}, "multiples of 256"),
        ({"head_size": 96}, "heads of 96"),
        ({"hidden": 64 * 256}, "too wide"),
        ({"ffn": 1 << 17, "hidden": 4096}, "too wide"),
        ({"layers": 2000}, "no shared memory"),
    ],
)
def test_dimensions_that_do_not_suit_it(change: dict[str, int], reason: str) -> None:
    assert reason in str(replace(OPT_125M, **change).objection(132, HOPPER_SHARED))


@pytest.mark.gpu
@pytest.mark.parametrize("nm", ["2:4", "4:8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_matches_the_kernels_one_by_one(nm: str, dtype: torch.dtype) -> None:
    model = small_opt(nm, dtype=dtype).to("cuda").eval()
    runner = runner_for(model)
    assert isinstance(runner, CudaRunner)
    assert runner.whole is not None
    for prompt in (1, 2, 63, 64, 65, 200, 513, 600):
        session = admitted(runner, prompt, 8)
        for _ in range(3):
            before, cache = copied(session.cache), session.cache
            runner.whole.logits.fill_(float("nan"))
            found = runner.whole(cache.k, cache.v, cache.state, greedy=True).clone()
            expected = Runner.logits(runner, before)
            assert_same_step(found, cache, expected, before)
            state, length = cache.state, int(before.state.lengths[0])
            chosen = int(found.argmax())
            assert (int(state.tokens[0]), int(state.lengths[0]), int(state.filled[0])) == (chosen, length + 1, length + 2)
            assert int(state.history[0, length + 1]) == chosen


@pytest.mark.gpu
def test_generation_is_the_same_with_and_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "engine")
    same_generation_with_and_without("whole", "one kernel per step")


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "head_size"), [(1024, 64), (4096, 128), (5120, 128)])
def test_phases_longer_than_the_ring(hidden: int, head_size: int) -> None:
    """A slot has several turns in the head's phase, and with wide layers in each: copies that arrive in another order do no harm."""
    sizes = {"hidden_size": hidden, "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden, "num_attention_heads": hidden // head_size}
    torch.manual_seed(0)
    config = OPTConfig(**sizes, num_hidden_layers=2, vocab_size=50272, max_position_embeddings=640, dtype=torch.bfloat16)
    with torch.device("cuda"):
        dense = OPTForCausalLM(config).to(torch.bfloat16)
    runner: Any = runner_for(SparseOPTForCausalLM.from_dense(dense, nm="2:4").eval())
    session = admitted(runner, 20, 600)
    for _ in range(500):
        session.step()
    before, cache = copied(session.cache), session.cache
    found = runner.whole(cache.k, cache.v, cache.state, greedy=True).clone()
    assert int(before.state.lengths[0]) == 519
    assert relative_error(found, Runner.logits(runner, before).double()) < 2e-2


@pytest.mark.gpu
@pytest.mark.slow
def test_a_step_is_clean_under_memcheck() -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer (CUDA toolkit) is not installed")
    script = "from test_decode_model import *\nsession = admitted(runner_for(small_opt('2:4').cuda().eval()), 70, 8)\n"
    script += "for _ in range(4):\n    session.step()\ntorch.cuda.synchronize()\nprint('stepped')"
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", "--kernel-regex", "kns=decode_model", sys.executable, "-c", script]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]
    assert "stepped" in found.stdout


@pytest.mark.gpu
def test_a_finished_row_changes_nothing() -> None:
    runner: Any = runner_for(small_opt("2:4").to("cuda").eval())
    session, before = assert_a_finished_row_stays(
        runner, lambda session: runner.whole(session.cache.k, session.cache.v, session.cache.state, greedy=True)
    )
    assert torch.equal(session.cache.state.history, before.state.history)


@pytest.mark.gpu
def test_models_that_it_cannot_run(tiny_opt: Path) -> None:
    for model, reason in (
        (small_opt("2:4", dtype=torch.float32), "computes in torch.float32"),
        (small_opt("2:4", num_attention_heads=8), "heads of 32"),
        (small_opt("1:4"), "neither all 2:4 nor all 4:8"),
        (SparseOPTForCausalLM.from_pretrained(tiny_opt, nm="2:4", dtype=torch.bfloat16), "heads of 16|widths 64"),
    ):
        found = whole_step(DecoderWeights.of(model.to("cuda").eval()))
        assert isinstance(found, str)
        assert re.search(reason, found)


@pytest.mark.gpu
def test_the_variable_decides(tiny_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEP, "kernels")
    runner: Any = runner_for(small_opt("2:4").to("cuda").eval())
    assert runner.whole is None
    assert runner.path(1) == "cuda graphs"
    monkeypatch.setenv(STEP, "one-kernel")
    with pytest.raises(InputError, match="asks for a step in one kernel, and the model computes in"):
        runner_for(small_opt("2:4", dtype=torch.float32).to("cuda").eval())
    monkeypatch.setenv(STEP, "two")
    with pytest.raises(InputError, match="use auto, rows, half-layers, one-kernel or kernels"):
        runner_for(small_opt("2:4").to("cuda").eval())
