"""The transformers drop-in refuses what it cannot load, in one sentence and before weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, OPTForCausalLM

from sparse_engine import SparseOPTForCausalLM, SparsityPattern, registry
from sparse_engine.convert import convert
from sparse_engine.errors import CheckpointError, InputError, KernelUnavailableError
from sparse_engine.hf import SparseEngineConfig

FC1 = "model.decoder.layers.0.fc1"


@pytest.fixture(scope="module", params=["2:4", "0.5"])
def good(request: pytest.FixtureRequest, tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    convert(tiny_opt, out, pattern=SparsityPattern.parse(request.param))
    return out


@pytest.fixture
def packed(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "packed"))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def layer(config: dict[str, Any]) -> dict[str, Any]:
    return config["quantization_config"]["layers"][FC1]


@pytest.mark.parametrize("load", [SparseOPTForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("name", [f"{FC1}.values", f"{FC1}.bitmask", f"{FC1}.bias", "model.decoder.layers.1.self_attn_layer_norm.weight"])
def test_missing_tensor(name: str, load: Any, packed: Path) -> None:
    edit_tensors(packed, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load.from_pretrained(packed)


@pytest.mark.parametrize("load", [SparseOPTForCausalLM, AutoModelForCausalLM])
def test_bitmask_that_contradicts_the_values(load: Any, packed: Path) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{FC1}.bitmask"][3, 2] ^= 1

    edit_tensors(packed, flip)
    with pytest.raises(CheckpointError, match=f"{FC1}: .*bitmask"):
        load.from_pretrained(packed)


@pytest.mark.parametrize("cut", ["values", "bitmask"])
def test_tensor_of_another_size(cut: str, packed: Path) -> None:
    edit_tensors(packed, lambda tensors: tensors.update({f"{FC1}.{cut}": tensors[f"{FC1}.{cut}"][:-1].clone()}))
    with pytest.raises(CheckpointError, match=rf"{FC1}.{cut} is .*config.json implies"):
        SparseOPTForCausalLM.from_pretrained(packed)


def test_tensor_of_another_type(packed: Path) -> None:
    edit_tensors(packed, lambda tensors: tensors.update({f"{FC1}.bitmask": tensors[f"{FC1}.bitmask"].to(torch.int64)}))
    with pytest.raises(CheckpointError, match=f"{FC1}.bitmask is torch.int64"):
        SparseOPTForCausalLM.from_pretrained(packed)


def test_value_that_is_not_finite(packed: Path) -> None:
    edit_tensors(packed, lambda tensors: tensors[f"{FC1}.values"].view(-1)[7:8].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=f"{FC1}.values holds NaN"):
        SparseOPTForCausalLM.from_pretrained(packed)


def test_value_that_the_requested_type_cannot_hold(packed: Path) -> None:
    edit_tensors(packed, lambda tensors: tensors[f"{FC1}.values"].view(-1)[7:8].fill_(1e6))
    with pytest.raises(CheckpointError, match="infinite values as float16"):
        SparseOPTForCausalLM.from_pretrained(packed, dtype=torch.float16)


def test_truncated_file(packed: Path) -> None:
    weights = packed / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        SparseOPTForCausalLM.from_pretrained(packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quantization_config"].update(layers={}), "at least one"),
        (lambda c: c["quantization_config"].update(layers=[FC1]), "at least one"),
        (lambda c: c["quantization_config"].update(version=2), "version 2"),
        (lambda c: c["quantization_config"].update(extra=1), "unknown key 'extra'"),
        (lambda c: layer(c).update(pattern="7:4"), "must be 1 to 3"),
        (lambda c: layer(c).update(pattern="two of four"), "cannot read"),
        (lambda c: layer(c).update(format="nothing"), "unknown packed format"),
        (lambda c: layer(c).update(pattern="0.5", format="nm"), "does not hold pattern"),
        (lambda c: layer(c).update(pattern="0.5", format="unstructured", nnz=-1), "needs nnz"),
        (lambda c: layer(c).update(pattern="0.5", format="unstructured", nnz="9"), "needs nnz"),
        (lambda c: layer(c).update(pattern="0.5", format="unstructured", nnz=1 << 60), "stored values"),
        (lambda c: layer(c).update(pattern="0.5", format="unstructured", nnz=17), "config.json implies"),
        (lambda c: layer(c).pop("pattern"), "must be like"),
        (lambda c: layer(c).update(weights="pickle"), "must be like"),
        (lambda c: c["quantization_config"]["layers"].update({"lm_head": layer(c)}), "no prunable linear"),
        (lambda c: c["quantization_config"]["layers"].update({"model..fc1": layer(c)}), "no module name"),
        (lambda c: c["quantization_config"]["layers"].pop(FC1), f"{FC1}.weight is missing"),
        (lambda c: c.update(ffn_dim=1 << 18), "config.json implies"),
        (lambda c: c.update(hidden_size=1 << 40), "hidden_size must be"),
        (lambda c: c.update(model_type="llama"), "not supported"),
    ],
)
def test_config_that_contradicts_the_tensors(change: Callable[[dict[str, Any]], None], message: str, packed: Path) -> None:
    edit_config(packed, change)
    with pytest.raises(CheckpointError, match=message):
        SparseOPTForCausalLM.from_pretrained(packed)


def test_a_checkpoint_does_not_choose_its_backend(packed: Path) -> None:
    edit_config(packed, lambda config: config["quantization_config"].update(backend="no such kernel"))
    assert SparseOPTForCausalLM.from_pretrained(packed).config.quantization_config.backend is None


def test_dense_checkpoint_needs_a_pattern(tiny_opt: Path) -> None:
    with pytest.raises(InputError, match=r"dense; pass nm='2:4' or sparsity=0.5"):
        SparseOPTForCausalLM.from_pretrained(tiny_opt)


@pytest.mark.parametrize("options", [{"nm": "2:4"}, {"sparsity": 0.5}])
def test_packed_checkpoint_takes_no_pattern(options: dict[str, Any], packed: Path) -> None:
    with pytest.raises(InputError, match="packed already"):
        SparseOPTForCausalLM.from_pretrained(packed, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nm": "2:4", "sparsity": 0.5}, "not both"),
        ({"nm": "0.5"}, "must be like '2:4'"),
        ({"nm": "2:3"}, "needs M in"),
        ({"sparsity": 1.5}, "strictly between 0 and 1"),
        ({"nm": "2:4", "pruner": "nothing"}, "unknown pruner"),
        ({"nm": "2:4", "pruner": "wanda"}, "sparse-engine convert .* --calibration"),
        ({"nm": "2:4", "pruner": "sparsegpt"}, "sparse-engine convert .* --calibration"),
        ({"nm": "2:4", "backend": "nothing"}, "unknown backend"),
        ({"nm": "2:4", "dtype": torch.float64}, "cannot be loaded as float64"),
        ({"nm": "2:4", "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "quantised further"),
        ({"nm": "2:4", "device_map": {"": "disk"}}, "offloaded to disk"),
    ],
)
def test_arguments(options: dict[str, Any], message: str, tiny_opt: Path) -> None:
    with pytest.raises(InputError, match=message):
        SparseOPTForCausalLM.from_pretrained(tiny_opt, **options)


@pytest.mark.parametrize("which", ["packed", "dense"])
def test_backend_that_cannot_run_is_refused_before_weights_are_read(
    which: str, packed: Path, tiny_opt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refuses(type(registry.get("reference"))):
        name = "refuses"

        def unsupported(self, problem: registry.Problem) -> str:
            return "runs nothing"

    monkeypatch.setitem(registry._KERNELS, "refuses", Refuses())
    monkeypatch.setattr(SparseOPTForCausalLM, "_load_pretrained_model", lambda *args, **kwargs: pytest.fail("weights were read"))
    monkeypatch.setattr("sparse_engine.checkpoint.Checkpoint.tensor", lambda *args: pytest.fail("weights were read"))
    source, options = (packed, {}) if which == "packed" else (tiny_opt, {"nm": "2:4"})
    with pytest.raises(KernelUnavailableError, match=r"refuses cannot run .* runs nothing"):
        SparseOPTForCausalLM.from_pretrained(source, backend="refuses", **options)


def test_pattern_that_does_not_divide(tmp_path: Path) -> None:
    from checkpoints import make_tiny_opt

    make_tiny_opt(tmp_path, hidden_size=68, word_embed_proj_dim=68)
    with pytest.raises(InputError, match="68 input columns, which 4:8 cannot divide"):
        SparseOPTForCausalLM.from_pretrained(tmp_path, nm="4:8")


def test_missing_and_pickled_checkpoints(tiny_opt: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint directory"):
        SparseOPTForCausalLM.from_pretrained(tmp_path / "nothing", nm="2:4")
    shutil.copy(tiny_opt / "config.json", tmp_path)
    torch.save(OPTForCausalLM.from_pretrained(tiny_opt).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights can run code"):
        SparseOPTForCausalLM.from_pretrained(tmp_path, nm="2:4")


def test_dense_checkpoint_with_a_missing_tensor(tiny_opt: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_opt, tmp_path / "dense"))
    edit_tensors(folder, lambda tensors: tensors.pop(f"{FC1}.bias"))
    with pytest.raises(CheckpointError, match=f"{FC1}.bias is missing"):
        SparseOPTForCausalLM.from_pretrained(folder, nm="2:4")
    edit_tensors(folder, lambda tensors: tensors.pop(f"{FC1}.weight"))
    with pytest.raises(CheckpointError, match=f"{FC1}.* is missing"):
        SparseOPTForCausalLM.from_pretrained(folder, nm="2:4")


def test_dense_checkpoint_is_not_packed_by_a_quantization_config(tiny_opt: Path) -> None:
    wanted = SparseEngineConfig({FC1: {"format": "nm", "pattern": "2:4"}})
    with pytest.raises(InputError, match="from_pretrained"):
        OPTForCausalLM.from_pretrained(tiny_opt, quantization_config=wanted)
