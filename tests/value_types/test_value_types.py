"""Quantised values: levels against the definition in float64, storage of nibbles, refusal of what is damaged, and whole models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_engine import SparseLinear, SparsityPattern, formats, registry, value_types
from sparse_engine.checkpoint import Checkpoint
from sparse_engine.convert import convert
from sparse_engine.engine.runner import Runner, runner_for
from sparse_engine.errors import CheckpointError, InputError, KernelUnavailableError
from sparse_engine.formats.base import VALUE_DTYPES, PackedWeight
from sparse_engine.hf import SparseOPTForCausalLM
from sparse_engine.mask import Mask
from sparse_engine.pruners.base import keep_largest
from sparse_engine.value_types.int4 import GROUP

QUANTISED = sorted(value_types.all_value_types().keys() - {value_types.PLAIN})
KINDS = pytest.mark.parametrize("kind", QUANTISED)
FC1 = "model.decoder.layers.0.fc1"


def draw(pattern: SparsityPattern, rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Mask]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, columns, generator=generator)
    mask = Mask(pattern, keep_largest(scores, *pattern.group) if pattern.is_nm else scores > pattern.density)
    return torch.randn(rows, columns, generator=generator).to(dtype), mask


def pack(text: str, rows: int, columns: int, kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[PackedWeight, Tensor]:
    pattern = SparsityPattern.parse(text)
    weight, mask = draw(pattern, rows, columns, dtype, seed)
    return formats.for_pattern(pattern).pack(weight, mask, value_type=kind), mask.apply(weight)


def e4m3(byte: int) -> float:
    """Sign, four bits of exponent, three of mantissa; Micikevicius et al. 2022, table 1."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    return float(sign * (2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8))


def levels_by_hand(packed: PackedWeight) -> Tensor:
    """float64 weights read out of the stored bytes one at a time, by the definition on disk."""
    rows, columns = packed.shape
    keep = formats.get(packed.format).keep(packed)
    values, scales = packed.tensors["values"].flatten().view(torch.uint8).tolist(), packed.tensors["scales"].double()
    dense = torch.zeros(rows, columns, dtype=torch.float64)
    place = 0
    for row in range(rows):
        for index, column in enumerate(torch.nonzero(keep[row]).flatten().tolist()):
            if packed.value_type == "int8":
                level = values[place + index]
                dense[row, column] = (level - 256 if level > 127 else level) * scales[row]
            elif packed.value_type == "fp8":
                dense[row, column] = e4m3(values[place + index]) * scales[row]
            else:
                nibble = values[place + index // 2] >> 4 * (index % 2) & 0xF
                dense[row, column] = (nibble - 16 if nibble > 7 else nibble) * scales[row, column // 128]
        kept = int(keep[row].sum())
        place += (kept + 1) // 2 if packed.value_type == "int4" else kept
    assert place == len(values)
    return dense


@KINDS
@settings(max_examples=30, deadline=None)
@given(
    text=st.sampled_from(["2:4", "4:8", "1:2", "3:8", "0.5", "0.9"]),
    dtype=st.sampled_from(VALUE_DTYPES),
    rows=st.integers(1, 5),
    units=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_what_is_stored_reads_as_defined_and_is_near_the_weight(
    kind: str, text: str, dtype: torch.dtype, rows: int, units: int, seed: int
) -> None:
    pattern = SparsityPattern.parse(text)
    columns = units * (pattern.m or 7)
    packed, weight = pack(text, rows, columns, kind, dtype, seed)
    fmt = formats.get(packed.format)
    fmt.check(packed)
    exact = levels_by_hand(packed)
    assert torch.equal(fmt.unpack(packed), exact.to(torch.float32).to(dtype))
    specs = fmt.specs(packed.shape, pattern, dtype, packed.nnz, kind)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.tensors.items()} == {n: (s.shape, s.dtype) for n, s in specs.items()}
    # int8 is off by half a level at most, fp8 by a sixteenth of the weight or half the smallest level; int4 may clip, but never to a
    # larger squared error than rounding without.
    step = weight.double().abs().amax(1, keepdim=True) / {"int8": 127, "fp8": 448, "int4": 7}[kind]
    if kind == "int8":
        assert bool(((exact - weight.double()).abs() <= step * (0.5 + 1e-4)).all())
    elif kind == "fp8":
        assert bool(((exact - weight.double()).abs() <= (weight.double().abs() / 16).clamp_min(step * 2**-10) * (1 + 1e-4)).all())
    else:
        assert float((exact - weight.double()).square().sum()) <= float((packed_mask(packed) * (step * 0.51) ** 2).sum())


def packed_mask(packed: PackedWeight) -> Tensor:
    return formats.get(packed.format).keep(packed).double()


def test_layout_of_nibbles_on_disk() -> None:
    weight = torch.tensor([[7.0, 0, -7, 0, 0, 3, 0, 0], [0, 0, 0, -2, 0, 0, 14, 0]])
    mask = Mask(SparsityPattern.parse("0.5"), weight != 0)
    packed = formats.get("unstructured").pack(weight, mask, value_type="int4")
    assert packed.tensors["values"].tolist() == [0x97, 0x03, 0x7F]
    assert packed.tensors["row_offsets"].tolist() == [0, 4, 6]
    assert packed.tensors["scales"].tolist() == [[1.0], [2.0]]
    assert packed.nnz == 6


def test_int4_clips_outliers_only_where_that_lowers_the_error() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 4 * GROUP, generator=generator)
    keep = torch.ones_like(weight, dtype=torch.bool)
    packed = formats.get("unstructured").pack(weight, Mask(SparsityPattern.parse("0.01"), keep), value_type="int4")
    plain = weight.view(4, 4, GROUP).abs().amax(2, keepdim=True) / 7
    rounded = (weight.view(4, 4, GROUP) / plain).round() * plain
    ours = formats.get("unstructured").unpack(packed)
    assert (ours - weight).square().sum() < 0.95 * (rounded.view(4, -1) - weight).square().sum()


@KINDS
@pytest.mark.parametrize("text", ["2:4", "0.5"])
def test_zero_rows_and_tiny_and_huge_weights(kind: str, text: str) -> None:
    pattern = SparsityPattern.parse(text)
    weight, mask = draw(pattern, 4, 256)
    weight[0], weight[1], weight[2] = 0.0, 1e-30, 3e4 * torch.sign(weight[2])
    fmt = formats.for_pattern(pattern)
    packed = fmt.pack(weight, mask, value_type=kind)
    fmt.check(packed)
    unpacked = fmt.unpack(packed)
    assert bool((unpacked[0] == 0).all())
    assert bool((unpacked[1].abs() <= 1e-29).all())
    assert torch.allclose(unpacked[2], mask.apply(weight)[2], rtol=1e-3)


@KINDS
@pytest.mark.parametrize("text", ["2:4", "0.5"])
def test_check_refuses_levels_and_scales_out_of_range(kind: str, text: str) -> None:
    packed, _ = pack(text, 4, 64, kind)
    fmt = formats.get(packed.format)
    values, scales = packed.tensors["values"], packed.tensors["scales"]
    for byte in (0x7F, 0xFF) if kind == "fp8" else (0x80,):
        wrong = values.clone()
        wrong.view(torch.uint8).flatten()[5] = byte
        with pytest.raises(CheckpointError, match=r"fc1: values holds (-8|-128|NaN), where (int4|int8|fp8) levels are"):
            fmt.check(replace(packed, tensors={**packed.tensors, "values": wrong}), "fc1")
    for bad in (-1.0, torch.nan, torch.inf):
        spoiled = scales.clone()
        spoiled.flatten()[-1] = bad
        with pytest.raises(CheckpointError, match="fc1: scales holds a negative, NaN or infinite value"):
            fmt.check(replace(packed, tensors={**packed.tensors, "scales": spoiled}), "fc1")
    with pytest.raises(CheckpointError, match=r"fc1\.scales is torch\.bfloat16"):
        fmt.check(replace(packed, tensors={**packed.tensors, "scales": scales.bfloat16()}), "fc1")
    with pytest.raises(CheckpointError, match=r"tensor fc1\.scales is missing"):
        fmt.check(replace(packed, tensors={name: t for name, t in packed.tensors.items() if name != "scales"}), "fc1")
    with pytest.raises(CheckpointError, match=r"fc1\.scales is"):
        fmt.check(replace(packed, tensors={**packed.tensors, "scales": scales[:-1]}), "fc1")


@KINDS
@pytest.mark.parametrize("text", ["2:4", "0.5"])
def test_the_layer_multiplies_by_what_the_values_stand_for(kind: str, text: str) -> None:
    packed, _ = pack(text, 24, 256, kind)
    bias = torch.randn(24)
    layer = SparseLinear.from_packed(packed, bias)
    x = torch.randn(3, 2, 256)
    exact = x.double() @ levels_by_hand(packed).T + bias.double()
    # A kernel may quantise its activations to int8 as well, which is some 0.5 % of the product.
    assert (layer(x) - exact).norm() / exact.norm() < 1e-2
    assert layer.nbytes == packed.nbytes
    assert f"values={kind}" in repr(layer)


@KINDS
def test_a_cast_changes_activations_and_bias_but_neither_levels_nor_scales(kind: str) -> None:
    packed, _ = pack("2:4", 24, 256, kind)
    layer = SparseLinear.from_packed(packed, torch.randn(24))
    before = {name: tensor.clone() for name, tensor in layer.packed.tensors.items()}
    layer(torch.randn(1, 256))
    layer.bfloat16()
    assert layer.packed.dtype is torch.bfloat16
    assert layer.bias is not None
    assert layer.bias.dtype is torch.bfloat16
    assert layer(torch.randn(1, 256).bfloat16()).dtype is torch.bfloat16
    layer.float()
    for name, tensor in layer.packed.tensors.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name


@KINDS
def test_kernels_without_a_form_for_the_values_say_so(kind: str) -> None:
    packed, _ = pack("2:4", 64, 256, kind, torch.bfloat16)
    problem = registry.Problem.of(packed, 1)
    problem = replace(problem, device="cuda", capability=(9, 0))
    with pytest.raises(KernelUnavailableError, match=f"reads plain values, not {kind} ones"):
        registry.select(problem, "torch_semi_structured")
    able = [verdict.kernel for verdict in registry.explain(problem) if verdict.reason is None]
    assert able == ["reference"]
    assert problem.packed_nbytes == 64 * 256 * (3 if kind == "int4" else 5) / 8


@KINDS
@pytest.mark.parametrize("text", ["2:4", "0.5"])
def test_convert_load_save_and_unpack(kind: str, text: str, tiny_opt: Path, tmp_path: Path) -> None:
    pattern = SparsityPattern.parse(text)
    convert(tiny_opt, tmp_path / "plain", pattern=pattern)
    convert(tiny_opt, tmp_path / "out", pattern=pattern, values=kind)
    checkpoint = Checkpoint(tmp_path / "out")
    assert {layer.value_type for layer in checkpoint.packed_layers.values()} == {kind}
    assert checkpoint.packed_layers[FC1].dtype is torch.float32
    again = convert(tmp_path / "plain", tmp_path / "again", values=kind)
    assert load_file(again.out / "model.safetensors").keys() == load_file(tmp_path / "out" / "model.safetensors").keys()
    for name, tensor in load_file(again.out / "model.safetensors").items():
        assert torch.equal(tensor, checkpoint.tensor(name)), name

    model = SparseOPTForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(5, 25)[None]
    logits = model(ids).logits
    dense = model.to_dense()
    assert torch.equal(dense.get_submodule(FC1).weight, checkpoint.weight(FC1))
    assert (dense(ids).logits - logits).norm() / logits.norm() < 1e-2
    model.save_pretrained(tmp_path / "saved")
    for name, tensor in load_file(tmp_path / "saved" / "model.safetensors").items():
        assert torch.equal(tensor, checkpoint.tensor(name)), name
    half = SparseOPTForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert half.get_submodule(FC1).packed.tensors["scales"].dtype == checkpoint.tensor(f"{FC1}.scales").dtype
    assert (half(ids).logits.float() - logits).norm() / logits.norm() < 5e-2
    loaded = SparseOPTForCausalLM.from_pretrained(
        tiny_opt, values=kind, **({"nm": text} if pattern.is_nm else {"sparsity": pattern.sparsity})
    )
    assert torch.equal(loaded.get_submodule(FC1).unpack(), checkpoint.weight(FC1))


@KINDS
def test_what_cannot_be_asked_for_is_refused_in_a_sentence(kind: str, tiny_opt: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    packed = convert(tiny_opt, tmp_path / "packed", pattern=SparsityPattern.nm(2, 4), values=kind).out
    other = next(name for name in QUANTISED if name != kind)
    with pytest.raises(InputError, match=f"holds {kind} values already; quantise the checkpoint that it came from"):
        convert(packed, tmp_path / "out", values=other)
    for source, options in ((packed, {}), (tiny_opt, {"pattern": SparsityPattern.nm(2, 4), "values": kind})):
        with pytest.raises(InputError, match=f"compressed-tensors' sparse layouts hold no {kind} values: write --format packed or dense"):
            convert(source, tmp_path / "out", output="compressed-tensors", **options)
    with pytest.raises(InputError, match="values can be quantised to fp8 or int4 or int8, got 'int2'"):
        convert(tiny_opt, tmp_path / "out", pattern=SparsityPattern.nm(2, 4), values="int2")
    with pytest.raises(InputError, match="nm, sparsity and values are for dense checkpoints"):
        SparseOPTForCausalLM.from_pretrained(packed, values=kind)
    assert not (tmp_path / "out").exists()
    refused = cli("convert", tiny_opt, "--nm", "2:4", "--values", "plain")
    assert refused.code == 2
    assert "values can be quantised to fp8 or int4 or int8, got 'plain'" in refused.err


def test_damaged_descriptions_are_refused_before_anything_is_loaded(tiny_opt: Path, tmp_path: Path) -> None:
    out = convert(tiny_opt, tmp_path / "out", pattern=SparsityPattern.nm(2, 4), values="int8").out
    written = (out / "config.json").read_text()
    for key, value, message in (("values", "int3", "unknown type of values 'int3'"), ("dtype", "int64", "dtype")):
        config = json.loads(written)
        config["quantization_config"]["layers"][FC1][key] = value
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            _ = Checkpoint(out).packed_layers
        with pytest.raises(CheckpointError, match=message):
            SparseOPTForCausalLM.from_pretrained(out)
    (out / "config.json").write_text(written)
    tensors = load_file(out / "model.safetensors")
    tensors[f"{FC1}.scales"] = tensors[f"{FC1}.scales"].half()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"fc1\.scales is torch\.float16 \(128,\), where config\.json implies torch\.float32"):
        SparseOPTForCausalLM.from_pretrained(out)


@KINDS
def test_inspect_names_the_values_and_counts_their_bytes(kind: str, tiny_opt: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    made = cli("convert", tiny_opt, "--nm", "2:4", "--values", kind, "--dtype", "bf16", "--out", tmp_path / "out")
    assert made.code == 0
    shown = json.loads(cli("inspect", tmp_path / "out", "--json", "--verify", "--device", "cpu").out)
    layer = next(row for row in shown["layers"] if row["layer"] == FC1)
    weights, scales = 128 * 64, 128 * (2 if kind == "int4" else 4)
    assert layer["values"] == kind
    assert layer["dtype"] == "bfloat16"
    assert layer["stored_nbytes"] == weights * (3 if kind == "int4" else 5) // 8 + scales
    assert layer["dense_nbytes"] == 2 * weights
    table = cli("inspect", tmp_path / "out", "--device", "cpu")
    assert f"{kind} for bfloat16" in table.out


def test_the_native_step_leaves_fp8_weights_to_others(tiny_opt: Path) -> None:
    model = SparseOPTForCausalLM.from_pretrained(tiny_opt, nm="2:4", values="fp8").eval()
    assert {kernel.name for _, kernel, _ in model.get_submodule(FC1).plan()} == {"reference"}
    assert "fp8 values, which the native step does not read" in str(runner_for(model))
    assert type(runner_for(model, forced=True)) is Runner
    tokens = model.generate(torch.arange(5, 15)[None], max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, model.to_dense().generate(torch.arange(5, 15)[None], max_new_tokens=4, do_sample=False))
