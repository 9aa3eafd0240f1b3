"""The transformers drop-in: loading, saving, generating, casting, and the masked dense model it must agree with."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import make_tiny_opt
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM, pipeline

import sparse_engine
from sparse_engine import SparseLinear, SparseOPTConfig, SparseOPTForCausalLM, SparsityPattern
from sparse_engine.convert import convert
from sparse_engine.errors import InputError
from sparse_engine.hf.quantizer import sparse_linears

PATTERNS = ("2:4", "4:8", "1:4", "0.5")
PROMPTS = ["The Secretary shall make grants", "This Act", "bridges repaired under this Act shall report"]


def keyword(pattern: str) -> dict[str, object]:
    return {"nm": pattern} if ":" in pattern else {"sparsity": float(pattern)}


@pytest.fixture(scope="module", params=PATTERNS)
def packed_dir(request: pytest.FixtureRequest, tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    convert(tiny_opt, out, pattern=SparsityPattern.parse(request.param))
    return out


@pytest.fixture(scope="module")
def packed_24(tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    convert(tiny_opt, out, pattern=SparsityPattern.nm(2, 4))
    return out


@pytest.fixture(scope="module")
def masked_24(tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> OPTForCausalLM:
    out = tmp_path_factory.mktemp("masked") / "model"
    convert(tiny_opt, out, pattern=SparsityPattern.nm(2, 4), output="dense")
    return OPTForCausalLM.from_pretrained(out)


def tokens(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def assert_close(got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < limit, f"relative error {error:.2e}"


def test_loads_what_convert_writes(packed_dir: Path) -> None:
    model = SparseOPTForCausalLM.from_pretrained(packed_dir)
    assert type(model.config) is SparseOPTConfig
    assert model.config.model_type == "sparse_opt"
    assert sum(1 for _ in sparse_linears(model)) == 12
    assert all(module._plan is not None for _, module in sparse_linears(model)), "kernels are chosen while loading"
    assert not model.training
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    dense = model.to_dense()
    assert type(dense) is OPTForCausalLM
    assert_close(logits(model, tokens()), logits(dense, tokens()), 1e-5)


def test_to_dense_is_the_masked_dense_checkpoint(packed_24: Path, masked_24: OPTForCausalLM) -> None:
    dense = SparseOPTForCausalLM.from_pretrained(packed_24).to_dense()
    want = masked_24.state_dict()
    got = dense.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert dense.lm_head.weight is dense.model.decoder.embed_tokens.weight


def test_state_dict_keys_are_those_of_the_checkpoint(packed_dir: Path) -> None:
    keys = set(SparseOPTForCausalLM.from_pretrained(packed_dir).state_dict())
    assert keys - set(load_file(packed_dir / "model.safetensors")) == {"lm_head.weight"}
    assert not any(key.endswith("fc1.weight") for key in keys)
    assert {"model.decoder.layers.0.fc1.values", "model.decoder.layers.0.fc1.bitmask", "model.decoder.layers.0.fc1.bias"} <= keys


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packing_while_loading_equals_convert(pattern: str, tiny_opt: Path, tmp_path: Path) -> None:
    convert(tiny_opt, tmp_path / "out", pattern=SparsityPattern.parse(pattern))
    want = SparseOPTForCausalLM.from_pretrained(tmp_path / "out")
    got = SparseOPTForCausalLM.from_pretrained(tiny_opt, **keyword(pattern))
    assert got.config.quantization_config.to_dict() == want.config.quantization_config.to_dict()
    for (name, tensor), (other, expected) in zip(got.state_dict().items(), want.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(tensor, expected), name
    assert got.generation_config.to_dict() == want.generation_config.to_dict()


def test_masked_checkpoint_is_packed_without_loss(tiny_opt: Path, tmp_path: Path) -> None:
    model = OPTForCausalLM.from_pretrained(tiny_opt)
    torch.manual_seed(1)
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    for linear in linears:
        # Random positions, not the largest, and some groups with fewer than two weights.
        keep = torch.rand(linear.weight.shape[0], linear.weight.shape[1] // 4, 4).argsort(-1) < 2
        keep[:3, :2] = False
        linear.weight.data.mul_(keep.flatten(1))
    model.save_pretrained(tmp_path / "masked")
    packed = SparseOPTForCausalLM.from_pretrained(tmp_path / "masked", nm="2:4")
    for (name, module), linear in zip(sparse_linears(packed), linears, strict=True):
        assert torch.equal(module.unpack(), linear.weight.data + 0.0), name


def test_from_dense_packs_a_model_in_memory(tiny_opt: Path, masked_24: OPTForCausalLM) -> None:
    packed = SparseOPTForCausalLM.from_dense(OPTForCausalLM.from_pretrained(tiny_opt), nm="2:4")
    assert isinstance(packed, SparseOPTForCausalLM)
    assert_close(logits(packed, tokens()), logits(masked_24, tokens()), 1e-5)
    with pytest.raises(InputError, match="needs nm"):
        SparseOPTForCausalLM.from_dense(masked_24)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_loads_compressed_tensors_layout(pattern: str, tiny_opt: Path, tmp_path: Path) -> None:
    convert(tiny_opt, tmp_path / "ours", pattern=SparsityPattern.parse(pattern))
    convert(tiny_opt, tmp_path / "theirs", pattern=SparsityPattern.parse(pattern), output="compressed-tensors")
    want = SparseOPTForCausalLM.from_pretrained(tmp_path / "ours")
    got = SparseOPTForCausalLM.from_pretrained(tmp_path / "theirs")
    assert all(torch.equal(tensor, want.state_dict()[name]) for name, tensor in got.state_dict().items())
    got.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(SparseOPTForCausalLM.from_pretrained(tmp_path / "again"), tokens()), logits(want, tokens()))


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_post_norm_with_projections(pattern: str, tiny_opt_350m: Path, tmp_path: Path) -> None:
    model = SparseOPTForCausalLM.from_pretrained(tiny_opt_350m, **keyword(pattern))
    assert type(model.model.decoder.project_in) is torch.nn.Linear
    assert model.model.decoder.final_layer_norm is None
    model.save_pretrained(tmp_path)
    again = SparseOPTForCausalLM.from_pretrained(tmp_path)
    assert_close(logits(again, tokens()), logits(model.to_dense(), tokens()), 1e-5)


def test_save_round_trip(packed_dir: Path, tmp_path: Path) -> None:
    model = SparseOPTForCausalLM.from_pretrained(packed_dir)
    model.save_pretrained(tmp_path)
    want, got = load_file(packed_dir / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (packed_dir, tmp_path))
    for key in ("model_type", "architectures", "quantization_config"):
        assert after[key] == before[key]
    assert torch.equal(logits(SparseOPTForCausalLM.from_pretrained(tmp_path), tokens()), logits(model, tokens()))


def test_save_over_the_directory_it_came_from(packed_24: Path, masked_24: OPTForCausalLM, tmp_path: Path) -> None:
    SparseOPTForCausalLM.from_pretrained(packed_24).save_pretrained(tmp_path)
    model = SparseOPTForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert_close(logits(SparseOPTForCausalLM.from_pretrained(tmp_path), tokens()), logits(masked_24, tokens()), 1e-5)


def test_saves_no_pickle_and_no_dense_model(packed_24: Path, tmp_path: Path) -> None:
    model = SparseOPTForCausalLM.from_pretrained(packed_24)
    with pytest.raises(InputError, match="safetensors only"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match="no packed layer"):
        model.dequantize().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_dequantize_gives_linears_with_the_masked_weights(packed_24: Path, masked_24: OPTForCausalLM) -> None:
    model = SparseOPTForCausalLM.from_pretrained(packed_24).dequantize()
    assert not list(sparse_linears(model))
    assert torch.equal(logits(model, tokens()), logits(masked_24, tokens()))


def test_auto_classes_and_pipeline(packed_24: Path, masked_24: OPTForCausalLM) -> None:
    assert type(AutoConfig.from_pretrained(packed_24)) is SparseOPTConfig
    model = AutoModelForCausalLM.from_pretrained(packed_24)
    assert type(model) is SparseOPTForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(packed_24)
    generate = pipeline("text-generation", model=str(packed_24), device="cpu")
    assert type(generate.model) is SparseOPTForCausalLM
    text = generate(PROMPTS[0], max_new_tokens=8, do_sample=False)[0]["generated_text"]
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    want = masked_24.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert text == tokenizer.decode(want[0], skip_special_tokens=True)


@pytest.mark.parametrize("cache", [None, "static"])
def test_batch_generation_with_left_padding(cache: str | None, packed_24: Path, masked_24: OPTForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packed_24, padding_side="left")
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert (inputs.attention_mask == 0).any()
    model = SparseOPTForCausalLM.from_pretrained(packed_24)
    inputs.pop("token_type_ids", None)
    got = model.generate(**inputs, max_new_tokens=24, do_sample=False, cache_implementation=cache)
    assert torch.equal(got, masked_24.generate(**inputs, max_new_tokens=24, do_sample=False))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(device_map: object, packed_24: Path, masked_24: OPTForCausalLM) -> None:
    model = SparseOPTForCausalLM.from_pretrained(packed_24, device_map=device_map)
    got = logits(model, tokens().to(model.device)).cpu()
    assert_close(got, logits(masked_24, tokens()), 1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_compiles_to_one_graph(pattern: str, tiny_opt: Path) -> None:
    model = SparseOPTForCausalLM.from_pretrained(tiny_opt, **keyword(pattern))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(logits(compiled, tokens()), logits(model, tokens()), 1e-5)
    compiled = torch.compile(model.to(torch.bfloat16), fullgraph=True, backend="aot_eager")
    assert_close(logits(compiled, tokens(1, 4)), logits(model, tokens(1, 4)), 1e-2)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_compiles_with_gradients(pattern: str, tiny_opt: Path) -> None:
    gradients = []
    for compiles in (False, True):
        model = SparseOPTForCausalLM.from_pretrained(tiny_opt, **keyword(pattern))
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model
        run(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append(model.model.decoder.embed_positions.weight.grad)
    assert float(gradients[0].norm()) > 0
    assert_close(gradients[1], gradients[0], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16"])
def test_dtype_casts_the_values(dtype: torch.dtype | str, packed_dir: Path) -> None:
    stored = SparseOPTForCausalLM.from_pretrained(packed_dir)
    want = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for load in (SparseOPTForCausalLM, AutoModelForCausalLM):
        model = load.from_pretrained(packed_dir, dtype=dtype)
        assert model.dtype == want
        for (name, module), (_, original) in zip(sparse_linears(model), sparse_linears(stored), strict=True):
            assert module.values.dtype == want
            assert torch.equal(module.unpack(), original.unpack().to(want)), name
    assert_close(logits(model, tokens()), logits(model.to_dense().float(), tokens()), 2e-2)


def test_casts_in_place(packed_24: Path) -> None:
    model = SparseOPTForCausalLM.from_pretrained(packed_24)
    want = logits(model, tokens())
    assert model.half().dtype == torch.float16
    assert next(m for _, m in sparse_linears(model)).values.dtype == torch.float16
    assert_close(logits(model, tokens()), want, 2e-2)
    assert model.float().dtype == torch.float32
    assert_close(logits(model, tokens()), want, 2e-2)
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    assert next(m for _, m in sparse_linears(model)).bitmask.dtype == torch.uint8


def test_saves_what_a_cast_left(packed_24: Path, tmp_path: Path) -> None:
    model = SparseOPTForCausalLM.from_pretrained(packed_24).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = SparseOPTForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_deep_copy_is_independent(packed_24: Path) -> None:
    model = SparseOPTForCausalLM.from_pretrained(packed_24)
    want = logits(model, tokens())
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, tokens()), want)
    for _, module in sparse_linears(model):
        module.values.zero_()
    assert torch.equal(logits(twin, tokens()), want)


def test_config_arguments_and_attention_implementation(packed_24: Path) -> None:
    model = SparseOPTForCausalLM.from_pretrained(packed_24, use_cache=False, attn_implementation="eager")
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "eager"
    assert json.loads(model.config.to_json_string())["quantization_config"]["quant_method"] == "sparse_engine"


def test_backend_is_forced_for_all_layers_and_not_saved(packed_24: Path, tiny_opt: Path, tmp_path: Path) -> None:
    for source, options in ((packed_24, {}), (tiny_opt, {"nm": "2:4"})):
        model = SparseOPTForCausalLM.from_pretrained(source, backend="reference", **options)
        for _, module in sparse_linears(model):
            assert {kernel.name for _, kernel, _ in module.plan()} == {"reference"}
    model.save_pretrained(tmp_path)
    assert "backend" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]


def test_untied_head_is_kept(tmp_path: Path) -> None:
    make_tiny_opt(tmp_path / "dense", tie_word_embeddings=False)
    model = SparseOPTForCausalLM.from_pretrained(tmp_path / "dense", nm="2:4")
    dense = OPTForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    model.save_pretrained(tmp_path / "packed")
    again = SparseOPTForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again.lm_head.weight, dense.lm_head.weight)
    assert not torch.equal(again.lm_head.weight, again.model.decoder.embed_tokens.weight)


def test_no_biases(tmp_path: Path) -> None:
    make_tiny_opt(tmp_path / "dense", enable_bias=False)
    model = SparseOPTForCausalLM.from_pretrained(tmp_path / "dense", nm="4:8")
    assert all(module.bias is None for _, module in sparse_linears(model))
    assert_close(logits(model, tokens()), logits(model.to_dense(), tokens()), 1e-5)


def test_without_the_import_transformers_refuses(packed_24: Path) -> None:
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(packed_24)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "sparse_opt" in done.stderr


def test_import_alone_registers_and_spares_the_modeling_code(packed_24: Path) -> None:
    code = (
        "import sys, sparse_engine; assert 'transformers.models.opt.modeling_opt' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(packed_24)!r})\n"
        f"AutoTokenizer.from_pretrained({str(packed_24)!r})\n"
        "print(type(model).__name__)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(sparse_engine.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "SparseOPTForCausalLM"


def test_tokenizer_class_follows_from_the_config(packed_24: Path, tmp_path: Path) -> None:
    model = SparseOPTForCausalLM.from_pretrained(packed_24)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(packed_24).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 2


@pytest.mark.slow
def test_real_checkpoint(data_dir: Path, tmp_path: Path) -> None:
    source = data_dir / "models" / "summ-7m"
    convert(source, tmp_path / "packed", pattern=SparsityPattern.nm(2, 4))
    convert(source, tmp_path / "masked", pattern=SparsityPattern.nm(2, 4), output="dense")
    model = SparseOPTForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    dense = OPTForCausalLM.from_pretrained(tmp_path / "masked", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "packed", padding_side="left")
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    got = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(got, dense.generate(**inputs, max_new_tokens=12, do_sample=False))
    assert sum(module.nbytes for _, module in sparse_linears(model)) < 0.6 * sum(
        module.in_features * module.out_features * 4 for _, module in sparse_linears(model) if isinstance(module, SparseLinear)
    )
