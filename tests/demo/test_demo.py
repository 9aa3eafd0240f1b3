"""The demo: its packed model, its figures, and that what it prints comes from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import OPTForCausalLM

from sparse_engine import registry
from sparse_engine.checkpoint import Checkpoint
from sparse_engine.cli import main
from sparse_engine.convert.pipeline import verify
from sparse_engine.data import Rows
from sparse_engine.demo import compare as compare_module
from sparse_engine.demo import embedded, layer
from sparse_engine.pattern import SparsityPattern

SMALL_LAYER = {"q_proj": (64, 64), "fc1": (128, 64), "fc2": (64, 128)}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded.pack(tmp_path_factory.mktemp("demo") / "packed").out


@pytest.fixture
def one_bill(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rows]:
    rows = Rows(embedded.bills().rows[:1], 0)
    monkeypatch.setattr(compare_module, "bills", lambda: rows)
    return rows


def test_the_bills_are_complete_and_short() -> None:
    rows = embedded.bills().rows
    assert len({row["bill_id"] for row in rows}) == len(rows) == 6
    for row in rows:
        assert 150 <= len(row["text"].split()) <= 350, row["bill_id"]
        assert "SEC. 2." in row["text"]
        assert row["title"]
        assert row["summary"]


def test_calibration_text_does_not_hold_the_reference_summaries() -> None:
    text = (embedded.CHECKPOINT.parent / "calibration.jsonl").read_text()
    for row in embedded.bills().rows:
        assert json.dumps(row["summary"])[1:-1] not in text


def test_packing_the_embedded_model_gives_a_verified_2_of_4_checkpoint(packed: Path) -> None:
    checkpoint = Checkpoint(packed)
    verify(checkpoint)
    assert len(checkpoint.packed_layers) == 36
    assert all(spec.pattern == SparsityPattern.nm(2, 4) for spec in checkpoint.packed_layers.values())


def test_comparison_counts_bytes_and_finds_packing_changes_no_token(one_bill: Rows, tmp_path: Path) -> None:
    found = compare_module.compare(tmp_path / "packed")
    assert found.summaries == found.same_summaries == 1
    linear_weights = 6 * (4 * 256 * 256 + 2 * 256 * 1024)
    assert found.dense.linear_nbytes == 4 * linear_weights
    # Half the values and a bit for each; a kernel that keeps a layout of its own may pad it.
    assert 2.125 * linear_weights <= found.packed.linear_nbytes <= 2.3 * linear_weights
    assert found.dense.file_nbytes == (embedded.CHECKPOINT / "model.safetensors").stat().st_size
    assert found.packed.file_nbytes == (tmp_path / "packed" / "model.safetensors").stat().st_size
    saved = found.dense.linear_nbytes - found.packed.linear_nbytes
    assert found.dense.weight_nbytes - found.packed.weight_nbytes == saved
    assert found.kernels
    assert set(found.kernels) <= set(registry.all_kernels())
    assert found.dense.rouge_l is not None
    assert found.packed.rouge_l is not None
    assert found.dense.rouge_l > found.packed.rouge_l * 0.5 > 0


def test_weights_in_memory_count_tied_embeddings_once(tiny_opt: Path) -> None:
    model = OPTForCausalLM.from_pretrained(tiny_opt)
    stored = Checkpoint(tiny_opt)
    shapes = [stored.spec(name)[0] for name in stored.names() if name != "lm_head.weight"]
    total = sum(4 * (shape[0] * shape[1] if len(shape) == 2 else shape[0]) for shape in shapes)
    assert compare_module.weight_nbytes(model) == total


def test_layer_times_name_the_kernel_that_the_registry_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "LINEARS", SMALL_LAYER)
    found = layer.measure_layer(SparsityPattern.nm(2, 4), rounds=2)
    weights = sum(rows * columns for rows, columns in SMALL_LAYER.values())
    assert found.dense_bf16_nbytes == 2 * weights
    assert found.packed_nbytes == weights + weights // 8
    assert set(found.kernels) == set(SMALL_LAYER)
    assert all(name in registry.all_kernels() for name in found.kernels.values())
    assert min(found.packed_us, found.dense_bf16_us, found.dense_fp32_us) > 0


def test_the_command_prints_measured_figures_and_keeps_what_it_is_asked_to(
    one_bill: Rows, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(layer, "LINEARS", SMALL_LAYER)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(tmp_path / "kept"), "--json", str(tmp_path / "figures.json")])
    assert stopped.value.code == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    out = capfd.readouterr().out
    summariser = figures["summariser"]
    assert f"{summariser['packed']['file_nbytes'] / 2**20:.2f} MiB" in out
    assert f"{summariser['packed']['rouge_l']:.3f}" in out
    assert f"{summariser['dense']['tokens_per_second']:.1f}" in out
    assert f"makes {summariser['transformers_per_second']:.1f} tokens/s" in out
    assert summariser["packed"]["summaries"][0] in out
    assert "1 of 1 summaries are the same, token for token" in out
    assert f"{figures['layer']['packed_us']:,.0f} µs" in out
    assert Checkpoint(tmp_path / "kept").kind == "sparse_engine"


def test_without_the_rouge_package_the_table_says_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from sparse_engine.cli.demo import _summariser_table

    side = compare_module.Side(10, 20, 10, 5.0, None, ("A summary.",))
    same = compare_module.Comparison(side, side, ("reference",), 1.0, 1, 1, ("A title",), 2.0)
    Console().print(_summariser_table(same))
    assert "sparse-engine[eval]" in capsys.readouterr().out


def test_the_command_refuses_a_folder_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(tmp_path / "absent" / "packed")])
    assert stopped.value.code == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1
    assert "there is no directory" in error
    assert list(tmp_path.iterdir()) == []
