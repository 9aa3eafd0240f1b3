"""The converter: what it writes, that it resumes to the bit, and that nothing half-made is ever left."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import make_tiny_opt
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import OPTForCausalLM

from sparse_engine import Mask, SparsityPattern, pruners
from sparse_engine.calibrate import statistics_for
from sparse_engine.checkpoint import Checkpoint
from sparse_engine.convert import convert
from sparse_engine.convert.job import Job
from sparse_engine.convert.pipeline import verify
from sparse_engine.errors import CheckpointError, InputError, SparseEngineError
from sparse_engine.models.opt import OPTFamily
from sparse_engine.pruners.base import Needs, Pruner

PATTERNS = ("2:4", "4:8", "1:4", "3:16", "0.5")
TWO_FOUR = SparsityPattern.nm(2, 4)


@pytest.fixture(scope="module")
def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(4, 320, (length,), generator=generator) for length in (128, 128, 96, 33)]


@pytest.fixture(params=["tiny_opt", "tiny_opt_350m"])
def source(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("pruner", sorted(pruners.all_pruners()))
def test_every_pruner_and_pattern_gives_a_verified_packed_checkpoint(
    pruner: str, pattern: str, source: Path, samples: list[Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = convert(source, out, pattern=SparsityPattern.parse(pattern), pruner=pruner, calibration=samples)
    checkpoint = Checkpoint(out)
    verify(checkpoint)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert list(report.layers) == checkpoint.family.linears(checkpoint.config)
    for name, spec in report.layers.items():
        packed = checkpoint.packed(name)
        assert str(packed.pattern) == pattern
        assert spec.density == pytest.approx(SparsityPattern.parse(pattern).density, abs=0.01)
    stored = load_file(out / "model.safetensors")
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.removesuffix(".weight") not in report.layers:
            assert torch.equal(stored[name], tensor)
    assert json.loads((out / "config.json").read_text())["model_type"] == "sparse_opt"
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_layers_are_pruned_from_the_outputs_of_pruned_layers(source: Path, samples: list[Tensor], tmp_path: Path) -> None:
    """An independent run of the sequential loop, by hooks on the whole transformers model."""
    out = tmp_path / "out"
    convert(source, out, pattern=TWO_FOUR, pruner="wanda", calibration=samples)
    model = OPTForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    wanda = pruners.get("wanda")
    for layer in model.model.decoder.layers:
        statistics, hooks = {}, []
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                statistics[name] = statistics_for(wanda.needs, module.in_features, torch.device("cpu"))
                gather = statistics[name].update
                hooks.append(module.register_forward_pre_hook(lambda _module, inputs, gather=gather: gather(inputs[0])))
        with torch.no_grad():
            for ids in samples:
                model(ids[None])
        for hook in hooks:
            hook.remove()
        for name, gathered in statistics.items():
            weight = layer.get_submodule(name).weight
            weight.data = wanda.prune(weight.data, gathered, TWO_FOUR)[0]
    checkpoint = Checkpoint(out)
    for name in checkpoint.packed_layers:
        expected, got = model.get_submodule(name).weight, checkpoint.weight(name)
        # Sums of activations differ in their last bits between the two runs, which may flip a near tie.
        assert (expected != got).float().mean() < 0.002, name


def test_dense_output_is_the_unpacked_packed_one(source: Path, samples: list[Tensor], tmp_path: Path) -> None:
    for output in ("packed", "dense"):
        convert(source, tmp_path / output, pattern=TWO_FOUR, pruner="sparsegpt", calibration=samples, output=output)
    packed, dense = Checkpoint(tmp_path / "packed"), Checkpoint(tmp_path / "dense")
    assert dense.kind == "dense"
    for name in packed.packed_layers:
        assert torch.equal(packed.weight(name), dense.weight(name))
    loaded = OPTForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(loaded.model.decoder.layers[0].fc1.weight, packed.weight("model.decoder.layers.0.fc1"))


def test_packed_checkpoint_rewrites_to_other_formats_and_back(tiny_opt: Path, tmp_path: Path) -> None:
    for pattern, label in (("2:4", "a"), ("4:8", "b"), ("0.6", "c")):
        first = tmp_path / f"{label}1"
        convert(tiny_opt, first, pattern=SparsityPattern.parse(pattern))
        convert(first, tmp_path / f"{label}2", output="compressed-tensors")
        convert(tmp_path / f"{label}2", tmp_path / f"{label}3", output="dense")
        dense = Checkpoint(tmp_path / f"{label}3")
        for name in Checkpoint(first).packed_layers:
            assert torch.equal(Checkpoint(first).weight(name), dense.weight(name))


def test_dtype_is_that_of_all_stored_weights(tiny_opt: Path, tmp_path: Path) -> None:
    convert(tiny_opt, tmp_path / "out", pattern=TWO_FOUR, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if not name.endswith("bitmask")} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    convert(tmp_path / "out", tmp_path / "half", dtype=torch.float16)
    half = Checkpoint(tmp_path / "half")
    assert {spec.dtype for spec in half.packed_layers.values()} == {torch.float16}


def test_values_that_overflow_the_new_dtype_are_refused(tiny_opt: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.mkdir()
    tensors = load_file(tiny_opt / "model.safetensors")
    tensors["model.decoder.layers.1.fc2.weight"][3, 5] = 1e6
    save_file(tensors, big / "model.safetensors")
    (big / "config.json").write_text((tiny_opt / "config.json").read_text())
    with pytest.raises(InputError, match=r"layers\.1\.fc2 holds NaN or infinite"):
        convert(big, tmp_path / "out", pattern=TWO_FOUR, dtype=torch.float16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_weights_are_refused_by_name(value: float, tiny_opt: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    tensors = load_file(tiny_opt / "model.safetensors")
    tensors["model.decoder.layers.0.self_attn.k_proj.weight"][0, 0] = value
    save_file(tensors, bad / "model.safetensors")
    (bad / "config.json").write_text((tiny_opt / "config.json").read_text())
    with pytest.raises(InputError, match=r"model\.decoder\.layers\.0\.self_attn\.k_proj"):
        convert(bad, tmp_path / "out", pattern=TWO_FOUR)
    assert [file.name for file in tmp_path.iterdir()] == ["bad"]


def test_sharded_in_and_out(tiny_opt: Path, tmp_path: Path) -> None:
    OPTForCausalLM.from_pretrained(tiny_opt).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    convert(tmp_path / "sharded", tmp_path / "out", pattern=TWO_FOUR, max_shard_bytes=60_000)
    convert(tiny_opt, tmp_path / "whole", pattern=TWO_FOUR)
    shards, whole = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "whole")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert shards.names() == whole.names()
    for name in whole.names():
        assert torch.equal(shards.tensor(name), whole.tensor(name))


@pytest.mark.parametrize("pruner", sorted(pruners.all_pruners()))
@pytest.mark.parametrize("stop_after", [0, 1])
def test_interrupted_run_resumes_to_the_same_bytes(
    pruner: str, stop_after: int, source: Path, samples: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"pattern": TWO_FOUR, "pruner": pruner, "calibration": samples}
    convert(source, tmp_path / "straight", **settings)
    saved = Job.save
    calls = []

    def interrupted(self: Job, index: int, packed: dict[str, object]) -> None:
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(index)
        saved(self, index, packed)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "resumed", **settings)
    assert not (tmp_path / "resumed").exists()
    convert(source, tmp_path / "resumed", resume=True, **settings)
    assert files_of(tmp_path / "resumed") == files_of(tmp_path / "straight")
    assert not (tmp_path / "resumed.partial").exists()


def test_resume_under_other_settings_is_refused(tiny_opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise SparseEngineError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("sparse_engine.convert.pipeline.ShardWriter.finish", full)
        with pytest.raises(SparseEngineError, match="disk full"):
            convert(tiny_opt, tmp_path / "out", pattern=TWO_FOUR)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="started with another pattern; resume with the same settings"):
        convert(tiny_opt, tmp_path / "out", pattern=SparsityPattern.nm(4, 8), resume=True)
    convert(tiny_opt, tmp_path / "out", pattern=TWO_FOUR, resume=True)
    verify(Checkpoint(tmp_path / "out"))


def test_killed_process_leaves_no_result_and_resumes(tiny_opt: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from sparse_engine import SparsityPattern\n"
        "from sparse_engine.convert import convert\n"
        "def slow(items, description, total):\n"
        "    for item in items:\n"
        "        yield item\n"
        "        print(description, flush=True)\n"
        "        time.sleep(60)\n"
        "convert(sys.argv[1], sys.argv[2], pattern=SparsityPattern.nm(2, 4), track=slow)\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", script, tiny_opt, out], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("pruning")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert sorted(file.name for file in (tmp_path / "out.partial").iterdir()) == ["job.json", "layer-00000.json", "layer-00000.safetensors"]
    convert(tiny_opt, out, pattern=TWO_FOUR, resume=True)
    convert(tiny_opt, tmp_path / "straight", pattern=TWO_FOUR)
    assert files_of(out) == files_of(tmp_path / "straight")


def test_existing_result_is_kept_unless_told_otherwise(tiny_opt: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(tiny_opt, out, pattern=TWO_FOUR)
    before = files_of(out)
    with pytest.raises(InputError, match="exists; choose another --out or pass --overwrite"):
        convert(tiny_opt, out, pattern=SparsityPattern.nm(4, 8))
    assert files_of(out) == before
    convert(tiny_opt, out, pattern=SparsityPattern.nm(4, 8), overwrite=True)
    assert str(Checkpoint(out).packed_layers["model.decoder.layers.0.fc1"].pattern) == "4:8"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_verify_finds_a_changed_value(tiny_opt: Path, tmp_path: Path) -> None:
    convert(tiny_opt, tmp_path / "out", pattern=TWO_FOUR)
    file = tmp_path / "out" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["model.decoder.layers.1.fc1.values"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.fc1 does not unpack to the bytes that were written"):
        verify(Checkpoint(tmp_path / "out"))
    # Written anew it would get checksums of its own.
    with pytest.raises(CheckpointError, match="the file is damaged"):
        convert(tmp_path / "out", tmp_path / "again", values="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_one_layer_is_alive_at_a_time(tiny_opt: Path, samples: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    built: list[weakref.ref[torch.nn.Module]] = []
    build = OPTFamily.build_layer

    def counting(self: OPTFamily, *args: object, **kwargs: object) -> torch.nn.Module:
        gc.collect()
        assert all(ref() is None for ref in built)
        layer = build(self, *args, **kwargs)  # type: ignore[arg-type]
        built.append(weakref.ref(layer))
        return layer

    deep = make_tiny_opt(tmp_path / "deep", num_hidden_layers=5)
    monkeypatch.setattr(OPTFamily, "build_layer", counting)
    convert(deep, tmp_path / "out", pattern=TWO_FOUR, pruner="wanda", calibration=samples)
    assert len(built) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "is dense: give a pattern such as --nm 2:4"),
        ({"pattern": SparsityPattern.nm(16, 32), "pruner": "nothing"}, "unknown pruner 'nothing'"),
        ({"pattern": TWO_FOUR, "pruner": "wanda"}, "pruner wanda needs calibration text"),
        ({"pattern": TWO_FOUR, "pruner": "wanda", "calibration": [torch.zeros(129, dtype=torch.int64)]}, "1 to 128 tokens long"),
        ({"pattern": TWO_FOUR, "pruner": "wanda", "calibration": [torch.tensor([5, 320])]}, "token id 320, but there are 320"),
        ({"pattern": TWO_FOUR, "output": "zip"}, "unknown output format 'zip'; known: compressed-tensors, dense, packed"),
        ({"pattern": TWO_FOUR, "dtype": torch.int8}, "cannot store weights as torch.int8"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(
    settings: dict[str, object], message: str, tiny_opt: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        convert(tiny_opt, tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_columns_that_m_does_not_divide_are_refused(tmp_path: Path) -> None:
    odd = make_tiny_opt(tmp_path / "odd", hidden_size=24, word_embed_proj_dim=24, ffn_dim=40)
    with pytest.raises(InputError, match=r"q_proj has 24 input columns, which 16:32 cannot divide"):
        convert(odd, tmp_path / "out", pattern=SparsityPattern.nm(16, 32))


def test_pruning_a_packed_checkpoint_again_is_refused(tiny_opt: Path, tmp_path: Path) -> None:
    convert(tiny_opt, tmp_path / "out", pattern=TWO_FOUR)
    with pytest.raises(InputError, match="is packed already"):
        convert(tmp_path / "out", tmp_path / "again", pattern=TWO_FOUR)


def test_a_new_pruner_is_usable_without_touching_the_converter(tiny_opt: Path, samples: list[Tensor], tmp_path: Path) -> None:
    class FirstOfGroup(Pruner):
        """Keeps the first N of each group."""

        name = "first"
        needs = Needs.NOTHING

        def _prune(self, weight: Tensor, statistics: object, pattern: SparsityPattern) -> tuple[Tensor, Tensor]:
            n, m = pattern.group
            return weight, (torch.arange(weight.shape[1]) % m < n).expand(weight.shape).clone()

    pruners.register(FirstOfGroup())
    try:
        convert(tiny_opt, tmp_path / "out", pattern=TWO_FOUR, pruner="first", calibration=samples)
    finally:
        pruners._PLUGINS.known.pop("first")
    packed = Checkpoint(tmp_path / "out").packed("model.decoder.layers.0.fc1")
    assert set(packed.tensors["bitmask"].flatten().tolist()) == {0b00110011}
    assert Mask(TWO_FOUR, torch.arange(64).expand(128, 64) % 4 < 2).nnz == packed.nnz


def test_progress_is_reported_for_every_stage(tiny_opt: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    def recording(items: Iterator[object], description: str, total: int) -> Iterator[object]:
        seen.append((description, total))
        yield from items

    started = time.monotonic()
    report = convert(tiny_opt, tmp_path / "out", pattern=TWO_FOUR, track=recording)
    assert seen == [("pruning to 2:4 by magnitude", 2), ("writing", 2), ("verifying", 12)]
    assert 0 < report.seconds <= time.monotonic() - started + 1
    assert report.packed_linear_nbytes / report.dense_linear_nbytes == pytest.approx(0.5 + 1 / 32)
    assert report.out_nbytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert report.peak_rss_nbytes > 0


def test_no_machine_path_is_recorded(tiny_opt: Path, tmp_path: Path) -> None:
    convert(tiny_opt, tmp_path / "out", pattern=TWO_FOUR)
    for name, content in files_of(tmp_path / "out").items():
        assert os.fsencode(tmp_path) not in content, name
        assert os.fsencode(tiny_opt.parent) not in content, name
