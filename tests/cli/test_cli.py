"""The command line: what each command prints and writes, and that a bad request is one line, exit code 2 and nothing created."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import TEXT
from command_line import Result
from safetensors.torch import load_file
from transformers import OPTForCausalLM

from sparse_engine import SparseLinear, registry
from sparse_engine.cli import main
from sparse_engine.errors import KernelUnavailableError
from sparse_engine.hf.loading import load_model

ENTRY = [sys.executable, "-c", "from sparse_engine.cli import main; main()"]
COMMANDS = ("convert", "demo", "generate", "inspect", "summarize")


@pytest.fixture(scope="session")
def packed(tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "tiny-2of4"
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(tiny_opt), "--nm", "2:4", "--pruner", "magnitude", "--out", str(out)])
    assert stopped.value.code == 0
    return out


@pytest.fixture
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "bills.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {TEXT}", "summary": "Repairs bridges."}) + "\n" for i in range(6)))
    return path


def _copy(source: Path, target: Path, **config: object) -> Path:
    shutil.copytree(source, target)
    file = target / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return target


def _linears(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_file(path / "model.safetensors").items() if k.endswith(("proj.weight", "fc1.weight", "fc2.weight"))}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(cli, command: str) -> None:
    result = cli(command, "--help")
    assert result.code == 0
    assert f"Example: sparse-engine {command}" in result.out


def test_version_and_bare_command(cli) -> None:
    assert cli("--version") == (0, "sparse-engine 0.1.0\n", "")
    listed = cli("--help").out
    assert all(command in listed for command in COMMANDS)


def test_convert_by_magnitude_names_its_result_and_says_what_would_be_better(cli, tiny_opt: Path, tmp_path: Path) -> None:
    result = cli("convert", tiny_opt, "--nm", "4:8")
    assert result.code == 0, result.err
    assert "--calibration FILE (or c4, billsum) would keep far more quality" in result.err
    config = json.loads((tmp_path / "tiny-opt-4of8" / "config.json").read_text())
    assert config["model_type"] == "sparse_opt"
    assert "12 linears" in result.out
    assert "53.1%" in result.out  # fp32: (4 x 0.5 + 1/8) / 4 bytes
    assert "peak memory" in result.out
    assert "written to tiny-opt-4of8" in result.out


def test_convert_with_calibration_uses_sparsegpt_and_records_the_source(cli, tiny_opt: Path, calibration: Path, tmp_path: Path) -> None:
    result = cli("convert", tiny_opt, "--sparsity", "50%", "--calibration", calibration, "--samples", 4, "--length", 32, "--out", "half")
    assert result.code == 0, result.err
    assert "magnitude" not in result.err
    made = json.loads(cli("inspect", "half", "--json").out)
    assert {row["pattern"] for row in made["layers"]} == {"0.5"}
    written = (tmp_path / "half" / "sparse_engine.json").read_text()
    assert "sparsegpt" in written
    assert json.dumps(str(calibration)) in written


def test_calibrating_on_prompts(cli, tiny_opt: Path, calibration: Path) -> None:
    common = ("convert", tiny_opt, "--nm", "2:4", "--pruner", "wanda", "--calibration", calibration, "--samples", 2, "--length", 64)
    assert cli(*common, "--out", "plain").code == 0
    assert cli(*common, "--prompts", "--out", "prompts").code == 0
    plain, prompts = (load_file(Path(out) / "model.safetensors") for out in ("plain", "prompts"))
    assert any(not torch.equal(plain[name], prompts[name]) for name in plain)


@pytest.mark.parametrize("form", ["dense", "compressed-tensors"])
def test_a_packed_checkpoint_is_rewritten_in_another_form(cli, packed: Path, form: str, tmp_path: Path) -> None:
    result = cli("convert", packed, "--format", form, "--dtype", "bf16")
    assert result.code == 0, result.err
    out = tmp_path / f"tiny-2of4-{form}"
    assert cli("inspect", out, "--verify").code == 0
    if form == "dense":
        assert json.loads((out / "config.json").read_text())["model_type"] == "opt"
        for name, weight in _linears(out).items():
            assert weight.dtype == torch.bfloat16, name
            assert int((weight.view(-1, 4) != 0).sum(1).max()) <= 2, name


def test_dense_export_is_the_packed_weights_and_loads_anywhere(cli, packed: Path) -> None:
    assert cli("convert", packed, "--format", "dense", "--out", "dense").code == 0
    from sparse_engine.hf import SparseOPTForCausalLM

    ids = torch.tensor([[2, 50, 60, 70]])
    with torch.inference_mode():
        dense = OPTForCausalLM.from_pretrained("dense")(ids).logits
        sparse = SparseOPTForCausalLM.from_pretrained(packed)(ids).logits
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)


def test_generate_from_packed_equals_generate_from_its_dense_export(cli, packed: Path) -> None:
    assert cli("convert", packed, "--format", "dense", "--out", "dense").code == 0
    Path("prompt.txt").write_text("The Secretary shall")
    options = ("--max-new-tokens", 12)
    sparse = cli("generate", packed, "--prompt", "The Secretary shall", *options)
    assert sparse.code == 0, sparse.err
    assert "12 tokens in" in sparse.err
    dense = cli("generate", "dense", "--prompt-file", "prompt.txt", *options)
    assert dense.code == 0, dense.err
    assert sparse.out == dense.out
    assert sparse.out.strip()


def test_generate_samples_by_seed(cli, packed: Path) -> None:
    def sample(seed: int) -> str:
        result = cli("generate", packed, "--prompt", "A", "--temperature", 1.5, "--top-p", 0.95, "--seed", seed, "--max-new-tokens", 16)
        assert result.code == 0, result.err
        return result.out

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_generate_runs_the_backend_asked_for(cli, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = set()
    forward = SparseLinear.forward

    def spy(self: SparseLinear, x: torch.Tensor) -> torch.Tensor:
        kernels.update(kernel.name for _, kernel, _ in self.plan())
        return forward(self, x)

    monkeypatch.setattr(SparseLinear, "forward", spy)
    assert cli("generate", packed, "--prompt", "A", "--backend", "reference", "--max-new-tokens", 2).code == 0
    assert kernels == {"reference"}


def test_a_slow_kernel_is_not_taken_silently(cli, packed: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert cli("convert", packed, "--values", "fp8", "--out", "fp8").code == 0
    assert cli("generate", "fp8", "--prompt", "A", "--max-new-tokens", 2).code == 0
    assert "the reference kernel runs 12 layers, which is slow" in caplog.text
    caplog.clear()
    assert cli("generate", packed, "--prompt", "A", "--backend", "reference", "--max-new-tokens", 2).code == 0
    assert caplog.text == ""


def test_a_backend_is_asked_for_the_device_that_the_model_moves_to(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(type(registry.get("reference"))):  # type: ignore[misc]
        name = "elsewhere"
        devices = frozenset({"meta"})

    monkeypatch.setitem(registry._KERNELS, "elsewhere", Elsewhere())
    model = load_model(packed, backend="elsewhere", dtype=None, device=torch.device("meta"))
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert [layer.backend for layer in layers] == ["elsewhere"] * 12
    assert all(layer.values.is_meta for layer in layers)
    with pytest.raises(KernelUnavailableError, match=r"runs on meta, not cpu; --device chooses the device"):
        load_model(packed, backend="elsewhere", dtype=None, device=torch.device("cpu"))


@pytest.mark.gpu
def test_generate_on_a_gpu_by_a_forced_backend(cli, packed: Path) -> None:
    options = ("--prompt", "A", "--device", "cuda", "--dtype", "bf16", "--max-new-tokens", 2)
    for backend in ("reference", "cuda_nm"):
        done = cli("generate", packed, *options, "--backend", backend)
        assert done.code == 0, done.err


def test_inspect_prints_a_line_per_layer_and_why(cli, packed: Path) -> None:
    result = cli("inspect", packed, "--verify", "--why", "layers.0.fc1", "--device", "cpu")
    assert result.code == 0, result.err
    rows = [line for line in result.out.splitlines() if " 2:4 " in line]
    assert len(rows) == 12
    assert all("0.5000" in row and "53.1%" in row for row in rows)
    assert "kernels for layers.0.fc1 at M = 512" in result.out
    assert "reference: able" in result.out or "reference: chosen" in result.out
    assert "verified: 12 linears" in result.out


def test_inspect_json_holds_measured_sizes(cli, packed: Path) -> None:
    report = json.loads(cli("inspect", packed, "--json", "--device", "cpu").out)
    assert report["kind"] == "sparse_engine"
    fc1 = next(row for row in report["layers"] if row["layer"].endswith("layers.0.fc1"))
    assert fc1["stored_nbytes"] == 128 * 32 * 4 + 128 * 8
    assert fc1["dense_nbytes"] == 128 * 64 * 4
    assert list(fc1["buckets"]) == [str(rows) for rows in registry.ROW_BUCKETS]
    assert all(choice["us"] is None and choice["source"] == "estimate" for choice in fc1["buckets"].values()), (
        "nothing is measured on a CPU"
    )
    assert fc1["held_nbytes"] == fc1["stored_nbytes"]
    assert report["tuning_tables"] == []
    assert report["file_nbytes"] == (packed / "model.safetensors").stat().st_size


def test_inspect_of_a_dense_checkpoint_counts_its_zeros(cli, tiny_opt: Path) -> None:
    report = json.loads(cli("inspect", tiny_opt, "--json").out)
    assert report["kind"] == "dense"
    assert all(row["pattern"] is None and row["density"] > 0.99 for row in report["layers"])


def test_inspect_verify_finds_a_changed_byte(cli, packed: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(packed, tmp_path / "changed")
    file = changed / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin = header["model.decoder.layers.0.fc1.values"]["data_offsets"][0]
    data[8 + int.from_bytes(data[:8], "little") + begin] ^= 1
    file.write_bytes(data)
    result = cli("inspect", changed, "--verify")
    assert result.code == 2
    assert "layers.0.fc1" in result.err.splitlines()[-1]


def test_summarize_writes_jsonl_for_every_bill(cli) -> None:
    bill = "SECTION 1. SHORT TITLE.\n\n    This Act may be cited as the ``Bridge Repair Act''.\n"
    Path("one.txt").write_text(bill)
    Path("more.jsonl").write_text(json.dumps({"text": bill, "title": "To repair bridges.", "bill_id": "b1"}) + "\n")
    result = cli("summarize", "one.txt", "more.jsonl", "--max-new-tokens", 12, "--out", "out.jsonl")
    assert result.code == 0, result.err
    assert "packing the embedded 7M summariser" in result.err
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["one.txt", "more.jsonl"]
    assert rows[1]["bill_id"] == "b1"
    assert rows[0]["summary"] == rows[1]["summary"]
    assert rows[0]["summary"]


BAD_CONVERT = {
    "both patterns": (["--nm", "2:4", "--sparsity", "0.5"], "exclude each other"),
    "no pattern": ([], "is dense: give a pattern"),
    "N above M": (["--nm", "5:4"], "N must be 1 to 3, got 5:4"),
    "sparsity as nm": (["--nm", "0.5"], "--nm takes N:M"),
    "nm as sparsity": (["--sparsity", "2:4"], "--sparsity takes a share"),
    "all removed": (["--sparsity", "1.0"], "strictly between 0 and 1"),
    "unknown pruner": (["--nm", "2:4", "--pruner", "luck"], "unknown pruner 'luck'; known: magnitude"),
    "unknown type": (["--nm", "2:4", "--dtype", "int4"], "unknown --dtype 'int4'"),
    "unknown device": (["--nm", "2:4", "--device", "abacus"], "unknown --device 'abacus'"),
    "absent device": (["--nm", "2:4", "--device", "cuda:99"], "is not there"),
    "unknown format": (["--nm", "2:4", "--format", "zip"], "zip"),
    "unused calibration": (["--nm", "2:4", "--pruner", "magnitude", "--calibration", "c4"], "uses no calibration text"),
    "absent calibration": (["--nm", "2:4", "--calibration", "absent.jsonl"], "absent.jsonl: No such file"),
    "samples of nothing": (["--nm", "2:4", "--calibration", "x.txt", "--samples", "0"], "--samples"),
    "unknown option": (["--nm", "2:4", "--fast"], "--fast"),
    "samples too long": (["--nm", "2:4", "--calibration", "LONG", "--length", "129"], "1 to 128 tokens"),
}


def _refused(result: Result, expected: str) -> None:
    assert result.code == 2
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("sparse-engine: ")
    assert expected in lines[0]


@pytest.mark.parametrize("case", BAD_CONVERT)
def test_convert_refuses_in_one_line_and_creates_nothing(cli, tiny_opt: Path, tmp_path: Path, case: str, tmp_path_factory) -> None:
    options, expected = BAD_CONVERT[case]
    long_text = tmp_path_factory.mktemp("text") / "long.txt"
    long_text.write_text(TEXT * 20)
    options = [str(long_text) if option == "LONG" else option for option in options]
    result = cli("convert", tiny_opt, *options, *(["--samples", 1] if str(long_text) in options else []))
    _refused(result, expected)
    assert list(tmp_path.iterdir()) == []


def test_calibration_without_usable_rows_is_refused(cli, tiny_opt: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "no text here"}\n')
    _refused(cli("convert", tiny_opt, "--nm", "2:4", "--calibration", "rows.jsonl"), "rows.jsonl has no usable rows")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def _truncated(source: Path, target: Path) -> Path:
    file = _copy(source, target) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return target


def _pickled(source: Path, target: Path) -> Path:
    (_copy(source, target) / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2)}, target / "pytorch_model.bin")
    return target


def _config(text: str) -> Callable[[Path, Path], Path]:
    def make(source: Path, target: Path) -> Path:
        (_copy(source, target) / "config.json").write_text(text)
        return target

    return make


BAD_CHECKPOINTS = {
    "missing": (lambda source, target: target, "there is no checkpoint directory"),
    "truncated": (_truncated, "truncated"),
    "another architecture": (lambda source, target: _copy(source, target, model_type="llama"), "llama"),
    "pickled": (_pickled, "pickled weights can run code"),
    "no tensors for a layer": (lambda source, target: _copy(source, target, num_hidden_layers=3), "layers.2.self_attn"),
    "layers of another width": (lambda source, target: _copy(source, target, ffn_dim=256), "where "),
    "a size that is text": (lambda source, target: _copy(source, target, hidden_size="wide"), "hidden_size must be a whole number"),
    "a config that is a list": (_config("[]"), "holds no JSON object"),
    "a config cut short": (_config("{"), "is no valid JSON"),
}


@pytest.mark.parametrize("command", [("convert", "--nm", "2:4"), ("inspect",), ("generate", "--prompt", "A")], ids=lambda c: c[0])
@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_refused_by_every_command(cli, tiny_opt: Path, tmp_path: Path, tmp_path_factory, case: str, command) -> None:
    make, expected = BAD_CHECKPOINTS[case]
    checkpoint = make(tiny_opt, tmp_path_factory.mktemp("bad") / "checkpoint")
    _refused(cli(command[0], checkpoint, *command[1:]), expected)
    assert list(tmp_path.iterdir()) == []


def test_a_shape_that_m_does_not_divide_is_named(cli, tmp_path: Path, tmp_path_factory) -> None:
    from checkpoints import make_tiny_opt

    odd = make_tiny_opt(tmp_path_factory.mktemp("odd") / "opt", hidden_size=36, word_embed_proj_dim=36)
    _refused(cli("convert", odd, "--nm", "2:8"), "has 36 input columns, which 2:8 cannot divide")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_result_is_kept_unless_overwrite_is_given(cli, tiny_opt: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("keep")
    arguments = ("convert", tiny_opt, "--nm", "2:4", "--pruner", "magnitude", "--out", "there")
    _refused(cli(*arguments), "there exists; choose another --out or pass --overwrite")
    assert (tmp_path / "there" / "mine.txt").read_text() == "keep"
    assert cli(*arguments, "--overwrite").code == 0
    assert (tmp_path / "there" / "model.safetensors").exists()


def test_overwrite_does_not_replace_what_is_read(cli, tiny_opt: Path, tmp_path: Path) -> None:
    _copy(tiny_opt, tmp_path / "folder" / "opt")
    before = (tmp_path / "folder" / "opt" / "model.safetensors").read_bytes()
    for out in ("folder/opt", "folder", "folder/opt/../opt"):
        result = cli("convert", "folder/opt", "--nm", "2:4", "--pruner", "magnitude", "--out", out, "--overwrite")
        _refused(result, "--overwrite would replace folder/opt, which is read")
    (tmp_path / "file").write_text("keep")
    _refused(cli("convert", "folder/opt", "--nm", "2:4", "--pruner", "magnitude", "--out", "file", "--overwrite"), "file is a file")
    assert (tmp_path / "folder" / "opt" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_what_a_packed_checkpoint_cannot_be_asked(cli, packed: Path, tiny_opt: Path, tmp_path: Path) -> None:
    _refused(cli("convert", packed, "--nm", "2:4"), "is packed already")
    _refused(cli("inspect", packed, "--why", "layers.9.fc1"), "matches 0 packed layers")
    _refused(cli("generate", packed, "--prompt", "A", "--backend", "warp"), "unknown backend 'warp'")
    _refused(cli("generate", tiny_opt, "--prompt", "A", "--backend", "reference"), "is dense and runs on torch's own linear")
    _refused(cli("inspect", tiny_opt, "--verify"), "no sparse_engine.json to verify against")
    assert list(tmp_path.iterdir()) == []


def test_generate_and_summarize_refuse_bad_text(cli, packed: Path, tmp_path: Path, tmp_path_factory) -> None:
    _refused(cli("generate", packed), "--prompt TEXT or --prompt-file FILE")
    _refused(cli("generate", packed, "--prompt", "A", "--prompt-file", "b"), "one of the two")
    _refused(cli("generate", packed, "--prompt", ""), "the prompt is empty")
    _refused(cli("generate", packed, "--prompt-file", "absent.txt"), "absent.txt: No such file")
    _refused(cli("generate", packed, "--prompt", "A", "--max-new-tokens", 4000), "exceeds the model's 128 positions")
    _refused(cli("generate", packed, "--prompt", "A", "--temperature", 0), "--temperature must be a number above 0")
    _refused(cli("generate", packed, "--prompt", "A", "--temperature", "nan"), "--temperature must be a number above 0")
    _refused(cli("generate", packed, "--prompt", "A", "--top-p", 2), "--top-p")
    _refused(cli("generate", packed, "--prompt", "A", "--seed", 2**70), "'--seed'")
    _refused(cli("inspect", packed, "--why", ""), "matches 0 packed layers")
    _refused(cli("summarize", "absent.txt"), "absent.txt: No such file")
    _refused(cli("summarize"), "Missing argument")
    text = tmp_path_factory.mktemp("text") / "bill.txt"
    text.write_text(TEXT)
    _refused(cli("summarize", text, "--out", packed), "is a directory; give a file")
    _refused(cli("demo", "--out", packed), "exists; choose another --out")
    _refused(cli("demo", "--json", packed), "is a directory; give a file")
    for value in (0, -1, "nan", "inf"):
        _refused(cli("bench", "--device", "cpu", "--seconds", value), "--seconds must be a number above 0")
    _refused(cli("bench", "--device", "cpu", "--out", packed / "config.json"), "is or lies in a file")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_tokenizer_says_what_to_copy(cli, tiny_opt: Path, calibration: Path, tmp_path_factory) -> None:
    bare = _copy(tiny_opt, tmp_path_factory.mktemp("bare") / "opt")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    result = cli("convert", bare, "--nm", "2:4", "--calibration", calibration, "--length", 32)
    _refused(result, "has no tokenizer (tokenizer.json")


def test_an_interrupt_is_one_line_and_130(cli, tiny_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparse_engine.convert.convert", interrupted)
    result = cli("convert", tiny_opt, "--nm", "2:4", "--pruner", "magnitude")
    assert result.code == 130
    assert result.err == "sparse-engine: interrupted\n"


def _process(*arguments: object, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run([*ENTRY, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False, **options)


def test_as_a_process_errors_go_to_standard_error_without_a_traceback(tmp_path: Path) -> None:
    done = _process("inspect", "absent-checkpoint-directory/nowhere/at-all", cwd=tmp_path)
    _refused(Result(done.returncode, done.stdout, done.stderr), "there is no checkpoint directory")


def test_as_a_process_a_conversion_reports_plain_lines(tiny_opt: Path, tmp_path: Path) -> None:
    done = _process("convert", tiny_opt, "--nm", "2:4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "written to tiny-opt-2of4" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr

    assert [path.name for path in tmp_path.iterdir()] == ["tiny-opt-2of4"]
