"""Reading checkpoints: every storage, and every way in which a directory can be damaged or hostile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_engine import SparsityPattern, formats
from sparse_engine.checkpoint import Checkpoint, hub, resolve
from sparse_engine.checkpoint.writer import ShardWriter
from sparse_engine.convert import convert
from sparse_engine.errors import CheckpointError, SparseEngineError

FIXTURES = Path(__file__).parent / "data" / "compressed_tensors"
FC1 = "model.decoder.layers.0.fc1"


@pytest.fixture(scope="module")
def packed_dir(tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "tiny"
    convert(tiny_opt, out, pattern=SparsityPattern.nm(2, 4))
    return out


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda source: Path(shutil.copytree(source, tmp_path / source.name))


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_dense_checkpoint_gives_names_specs_and_weights(tiny_opt: Path) -> None:
    checkpoint = Checkpoint(tiny_opt)
    stored = load_file(tiny_opt / "model.safetensors")
    assert checkpoint.kind == "dense"
    assert checkpoint.packed_layers == {}
    assert checkpoint.names() == sorted(stored)
    assert checkpoint.spec(f"{FC1}.weight") == ((128, 64), torch.float32)
    assert torch.equal(checkpoint.weight(FC1), stored[f"{FC1}.weight"])
    assert checkpoint.nbytes == (tiny_opt / "model.safetensors").stat().st_size


def test_names_without_the_model_prefix_are_made_canonical(tiny_opt: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(tiny_opt)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_tensors(path, strip)
    assert Checkpoint(path).names() == Checkpoint(tiny_opt).names()


@pytest.mark.parametrize("kind", ["sparse-24-bitmask", "sparse-bitmask"])
def test_reads_what_compressed_tensors_wrote(kind: str) -> None:
    checkpoint = Checkpoint(FIXTURES / kind)
    expected = load_file(FIXTURES / kind / "expected.tensors")
    assert checkpoint.kind == "compressed-tensors"
    assert set(checkpoint.packed_layers) == set(expected)
    for linear, weight in expected.items():
        packed = checkpoint.packed(linear)
        assert packed.format == ("nm" if kind == "sparse-24-bitmask" else "unstructured")
        clean = torch.where(weight == 0, torch.zeros_like(weight), weight)
        assert torch.equal(formats.get(packed.format).unpack(packed).view(torch.int16), clean.view(torch.int16))


@pytest.mark.parametrize("kind", ["sparse-24-bitmask", "sparse-bitmask"])
def test_export_gives_back_the_tensors_that_compressed_tensors_wrote(kind: str, tmp_path: Path) -> None:
    convert(FIXTURES / kind, tmp_path / "out", output="compressed-tensors")
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(FIXTURES / kind / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    declared = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert declared["sparsity_config"]["format"] == kind
    assert declared["quant_method"] == "compressed-tensors"


def test_packed_checkpoint_describes_its_layers(packed_dir: Path, tiny_opt: Path) -> None:
    checkpoint = Checkpoint(packed_dir)
    assert checkpoint.kind == "sparse_engine"
    assert list(checkpoint.packed_layers) == Checkpoint(tiny_opt).family.linears(checkpoint.config)
    spec = checkpoint.packed_layers[FC1]
    assert (str(spec.pattern), spec.shape, spec.nnz, spec.density) == ("2:4", (128, 64), 4096, 0.5)
    assert int((checkpoint.weight(FC1) != 0).sum()) == 4096


def test_missing_directory_and_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint directory"):
        resolve(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported; supported: opt"),
        ({"hidden_size": -64}, "hidden_size must be a whole number"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers must be a whole number"),
        ({"num_attention_heads": 5}, "no multiple of 5 heads"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq'"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors format 'None'"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"a": 1}}}, "quantised as well as sparse"),
    ],
)
def test_unusable_configs_are_refused(changes: dict[str, object], message: str, tiny_opt: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(tiny_opt)
    edit_config(path, **changes)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(path).packed_layers  # noqa: B018


def test_config_that_is_no_json_is_refused(tiny_opt: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(tiny_opt)
    (path / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match="no valid JSON"):
        Checkpoint(path)


def test_pickled_weights_are_refused(tiny_opt: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(tiny_opt)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickled weights can run code and are refused"):
        Checkpoint(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors_are_refused(keep: int, tiny_opt: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(tiny_opt)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        Checkpoint(path)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "model.bin"])
def test_index_may_not_leave_its_directory(file: str, tiny_opt: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(tiny_opt)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match=r"no \.safetensors file of its own directory"):
        Checkpoint(path)


def test_missing_shard_is_named(tiny_opt: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(tiny_opt)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors is missing"):
        Checkpoint(path)


def test_weight_of_another_shape_than_the_config_is_refused(tiny_opt: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(tiny_opt)
    edit_config(path, ffn_dim=256)
    with pytest.raises(CheckpointError, match=r"fc1\.weight is \(128, 64\), where the config gives \(256, 64\)"):
        Checkpoint(path).weight(FC1)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("bitmask", lambda t: t.fill_(255), "does not keep exactly 2 of every 4"),
        ("bitmask", lambda t: t[:, :-1].contiguous(), r"fc1\.bitmask is torch.uint8 \(128, 7\)"),
        ("values", lambda t: t[:, :-1].contiguous(), r"fc1\.values is torch.float32 \(128, 31\)"),
        ("values", None, r"tensor model\.decoder\.layers\.0\.fc1\.values is missing"),
        ("bitmask", None, r"tensor model\.decoder\.layers\.0\.fc1\.bitmask is missing"),
    ],
)
def test_tampered_packed_tensors_are_refused(
    part: str, change: Callable[[torch.Tensor], torch.Tensor] | None, message: str, packed_dir: Path, copy: Callable[[Path], Path]
) -> None:
    path = copy(packed_dir)

    def tamper(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors.pop(f"{FC1}.{part}")
        if change is not None:
            tensors[f"{FC1}.{part}"] = change(tensor)

    edit_tensors(path, tamper)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(path).packed(FC1)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"format": "nm", "pattern": "5:4"}, "describes .*fc1 wrongly"),
        ({"format": "nm"}, "describes .*fc1 wrongly"),
        ({"format": "zip", "pattern": "2:4"}, "unknown packed format 'zip'"),
        ({"format": "nm", "pattern": "0.5"}, "does not hold it"),
    ],
)
def test_wrong_layer_descriptions_are_refused(entry: dict[str, str], message: str, packed_dir: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(packed_dir)
    declared = json.loads((path / "config.json").read_text())["quantization_config"]
    declared["layers"][FC1] = entry
    edit_config(path, quantization_config=declared)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(path).packed_layers  # noqa: B018


def test_layer_outside_the_model_is_refused(packed_dir: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(packed_dir)
    edit_config(path, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match="has no decoder linear"):
        Checkpoint(path).packed_layers  # noqa: B018


def test_shards_stay_under_their_limit_and_read_back(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    writer = ShardWriter(tmp_path, limit=900)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_a_full_disk_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparse_engine.checkpoint.writer.save_file", full)
    writer = ShardWriter(tmp_path, limit=900)
    writer.add("t", torch.zeros(10))
    with pytest.raises(SparseEngineError, match="No space left on device"):
        writer.finish()
    assert list(tmp_path.iterdir()) == []


class FakeHub:
    """Stands in for the Hub: a main branch and pull requests, each a list of files."""

    def __init__(self, main: list[str], pulls: dict[str, list[str]]) -> None:
        self.main, self.pulls = main, pulls

    def list_repo_files(self, repo: str, revision: str | None = None) -> list[str]:
        return self.main if revision is None else self.pulls[revision]

    def get_repo_discussions(self, repo: str, author: str, discussion_type: str) -> list[SimpleNamespace]:
        assert (author, discussion_type) == ("SFconvertbot", "pull_request")
        return [SimpleNamespace(git_reference=reference) for reference in self.pulls]


def use_hub(monkeypatch: pytest.MonkeyPatch, fake: FakeHub, tmp_path: Path) -> list[str | None]:
    revisions: list[str | None] = []

    def download(repo: str, revision: str | None, allow_patterns: list[str], local_files_only: bool = False) -> str:
        assert not any(pattern.endswith((".bin", ".py")) for pattern in allow_patterns)
        revisions.append(revision)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return revisions


def test_hub_repository_with_safetensors_comes_from_its_main_branch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    revisions = use_hub(monkeypatch, FakeHub(["model.safetensors"], {}), tmp_path)
    assert resolve("facebook/opt-125m") == tmp_path
    assert revisions == [None]


def test_pickled_hub_repository_comes_from_the_conversion_pull_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pulls = {"refs/pr/7": ["README.md"], "refs/pr/5": ["model.safetensors"]}
    revisions = use_hub(monkeypatch, FakeHub(["pytorch_model.bin"], pulls), tmp_path)
    assert resolve("facebook/opt-125m") == tmp_path
    assert revisions == ["refs/pr/5"]


def test_pickled_hub_repository_without_a_conversion_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_hub(monkeypatch, FakeHub(["pytorch_model.bin"], {}), tmp_path)
    with pytest.raises(CheckpointError, match="no safetensors weights on the Hub"):
        resolve("facebook/opt-125m")


def test_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_args: object, **_kwargs: object) -> str:
        raise ConnectionError("Name or service not known\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(hub, "_safetensors_revision", unreachable)
    with pytest.raises(CheckpointError, match=r"could not be had from the Hub \(Name or service not known\)$"):
        resolve("facebook/opt-125m")
