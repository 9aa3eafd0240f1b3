"""The native decode step against transformers' forward: weights of every type, instruction-set levels, padding, and full caches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OPTForCausalLM

from sparse_engine import Mask, SparseLinear, SparseOPTForCausalLM, SparsityPattern, formats, native
from sparse_engine.convert import convert
from sparse_engine.engine import native_step
from sparse_engine.engine.cpu import int8_head
from sparse_engine.engine.native_step import Decoder, Description
from sparse_engine.engine.runner import runner_for
from sparse_engine.errors import CheckpointError, InputError

pytestmark = pytest.mark.skipif(native_step.available() is not None, reason="needs the native library with the decode step")

LEVELS = native.supported_isas() if native.available() is None else []
SLOTS = 40
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
"""Relative error of logits against a float32 forward of the same weights."""

MODELS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "2:4": {"nm": "2:4"},
    "3:8": {"nm": "3:8"},
    "unstructured": {"sparsity": 0.6},
    "2:4-int8": {"nm": "2:4", "values": "int8"},
    "unstructured-int4": {"sparsity": 0.4, "values": "int4"},
}


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    native.set_isa(request.param)
    yield request.param
    native.set_isa(None)


@pytest.fixture(scope="module", params=["pre-norm", "post-norm", "odd"])
def checkpoint(request: pytest.FixtureRequest, tiny_opt: Path, tiny_opt_350m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from checkpoints import make_tiny_opt

    if request.param == "odd":
        # Widths that fill no vector: heads of 8, products of 40 and 24 columns, a vocabulary of 323.
        sizes: dict[str, object] = {
            "hidden_size": 40,
            "word_embed_proj_dim": 24,
            "ffn_dim": 72,
            "num_attention_heads": 5,
            "vocab_size": 323,
        }
        return make_tiny_opt(tmp_path_factory.mktemp("odd") / "odd", **sizes)
    return tiny_opt if request.param == "pre-norm" else tiny_opt_350m


def load(path: Path, packing: dict[str, Any] | None, dtype: torch.dtype = torch.float32) -> Any:
    if packing is None:
        return OPTForCausalLM.from_pretrained(path, dtype=dtype).eval()
    return SparseOPTForCausalLM.from_pretrained(path, dtype=dtype, **packing).eval()


def exact(model: Any) -> OPTForCausalLM:
    """The float32 transformers model with the very weights of ``model``."""
    dense = model.to_dense() if isinstance(model, SparseOPTForCausalLM) else OPTForCausalLM(model.config)
    if not isinstance(model, SparseOPTForCausalLM):
        dense.load_state_dict(model.state_dict())
    return dense.float().eval()


def poisoned(description: Description, batch: int, slots: int = SLOTS) -> tuple[Tensor, Tensor]:
    shape = (description.layers, batch, description.heads, slots, description.hidden // description.heads)
    return torch.full(shape, torch.nan, dtype=description.dtype), torch.full(shape, torch.nan, dtype=description.dtype)


def run(decoder: Decoder, ids: Tensor, starts: Tensor) -> Tensor:
    """Logits (batch, T, vocabulary) of ``ids`` (batch, T) fed token by token; a sequence begins at its start, and rows before are 0."""
    batch, length = ids.shape
    keys, values = poisoned(decoder.description, batch)
    logits = torch.zeros(batch, length, decoder.description.vocabulary)
    for t in range(length):
        here = starts <= t
        # Sequences that have not begun run at their first slot, which they write again later.
        at = torch.where(here, t, starts)
        got = decoder.step(ids[:, t], starts, at, keys, values)
        assert bool(torch.isfinite(got).all()), "a slot that nothing was written to was read"
        logits[here, t] = got[here]
    return logits


def reference(model: OPTForCausalLM, ids: Tensor, starts: Tensor) -> Tensor:
    mask = (torch.arange(ids.shape[1]) >= starts[:, None]).long()
    with torch.inference_mode():
        return model(ids, attention_mask=mask).logits.float() * mask[:, :, None]


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("packing", MODELS.values(), ids=MODELS)
def test_logits_are_those_of_the_forward_at_every_level(checkpoint: Path, packing: dict[str, Any] | None, level: str) -> None:
    model = load(checkpoint, packing)
    quantised = packing is not None and "values" in packing
    want_of = exact(model)
    for starts in ([0], [3, 0, 11]):
        ids = torch.randint(4, 300, (len(starts), 18), generator=torch.Generator().manual_seed(len(starts)))
        offsets = torch.tensor(starts)
        got = run(Decoder(Description(model), len(starts), SLOTS), ids, offsets)
        # Activations that meet int8 and int4 weights are rounded to int8.
        assert error(got, reference(want_of, ids, offsets)) < (3e-2 if quantised else TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packing", [None, {"nm": "2:4"}], ids=["dense", "2:4"])
def test_logits_of_16_bit_weights(tiny_opt: Path, packing: dict[str, Any] | None, dtype: torch.dtype, level: str) -> None:
    model = load(tiny_opt, packing, dtype)
    starts = torch.tensor([0, 5])
    ids = torch.randint(4, 300, (2, 18), generator=torch.Generator().manual_seed(7))
    got = run(Decoder(Description(model), 2, SLOTS), ids, starts)
    assert error(got, reference(exact(model), ids, starts)) < TOLERANCE[dtype]


def test_layers_of_several_patterns_share_no_packed_input(tiny_opt: Path, level: str) -> None:
    """At 12 sequences 2:4 and unstructured weights want their input laid out differently."""
    model = load(tiny_opt, {"nm": "2:4"}, torch.bfloat16)
    pattern = SparsityPattern.parse("0.5")
    for layer in model.model.decoder.layers:
        linear = layer.self_attn.k_proj
        weight = linear.unpack()
        mask = Mask(pattern, torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
        packed = formats.for_pattern(pattern).pack(weight, mask)
        layer.self_attn.k_proj = SparseLinear.from_packed(packed, linear.bias.detach())
    starts = torch.zeros(12, dtype=torch.long)
    ids = torch.randint(4, 300, (12, 6), generator=torch.Generator().manual_seed(3))
    got = run(Decoder(Description(model), 12, SLOTS), ids, starts)
    assert error(got, reference(exact(model), ids, starts)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_and_sequences_gives_the_same(tiny_opt: Path, threads: int) -> None:
    model, before = load(tiny_opt, {"nm": "2:4"}), torch.get_num_threads()
    want_of = exact(model)
    torch.set_num_threads(threads)
    try:
        for batch in (1, 2, 9, 16):
            starts = torch.arange(batch) % 4
            ids = torch.randint(4, 300, (batch, 8), generator=torch.Generator().manual_seed(batch))
            got = run(Decoder(Description(model), 16, SLOTS), ids, starts)
            assert error(got, reference(want_of, ids, starts)) < TOLERANCE[torch.float32]
    finally:
        torch.set_num_threads(before)


def test_an_int8_head_is_near_the_dense_one_and_never_used_unasked(tiny_opt: Path, level: str) -> None:
    model = load(tiny_opt, {"nm": "2:4"})
    weight = model.lm_head.weight.detach()
    head = int8_head(weight)
    assert (head["values"].float() * head["scales"][:, None] - weight).abs().max() <= weight.abs().max() / 250
    ids, starts = torch.randint(4, 300, (2, 6), generator=torch.Generator().manual_seed(3)), torch.zeros(2, dtype=torch.int64)
    want = reference(exact(model), ids, starts)
    assert 1e-4 < error(run(Decoder(Description(model, head=head), 2, SLOTS), ids, starts), want) < 2e-2
    assert error(run(Decoder(Description(model), 2, SLOTS), ids, starts), want) < TOLERANCE[torch.float32]


def test_the_head_of_the_configuration_is_used_by_generate(tiny_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_opt, {"nm": "2:4"})
    plain = runner_for(model)
    assert not isinstance(plain, str)
    model.config.head_values = "int8"
    quantised = runner_for(model)
    assert quantised is not plain
    monkeypatch.setenv("SPARSE_ENGINE_GENERATE", "engine")
    ids = torch.arange(5, 17)[None]
    with torch.inference_mode():
        best = model(ids).logits[0, -1].topk(4).indices.tolist()
    assert int(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]) in best


def test_generations_of_several_threads_do_not_meet(tiny_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_ENGINE_GENERATE", "engine")
    model = load(tiny_opt, {"nm": "2:4"})
    prompts = [torch.randint(4, 300, (1 + i % 2, 5 + i), generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def tokens(prompt: Tensor) -> list[list[int]]:
        mask = torch.ones_like(prompt)
        found: list[list[int]] = model.generate(prompt, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=None).tolist()
        return found

    alone = [tokens(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokens, prompts * 3)) == alone * 3


def test_a_forced_backend_is_not_passed_by(tiny_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_opt, {"nm": "2:4", "backend": "reference"})
    ids = torch.arange(5, 9)[None]
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert model.generation_path == "transformers, since the model has layers that are to run on backend reference"
    monkeypatch.setenv("SPARSE_ENGINE_GENERATE", "engine")
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert model.generation_path == "engine (eager)"


def test_convert_records_the_head_and_only_in_packed_checkpoints(tiny_opt: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    made = cli("convert", tiny_opt, "--nm", "2:4", "--values", "int8", "--lm-head", "int8", "--out", tmp_path / "out")
    assert made.code == 0
    model = SparseOPTForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.head_values == "int8"
    assert not hasattr(model.to_dense().config, "head_values")
    model.save_pretrained(tmp_path / "saved")
    assert SparseOPTForCausalLM.from_pretrained(tmp_path / "saved").config.head_values == "int8"
    assert convert(tmp_path / "out", tmp_path / "again", dtype=torch.bfloat16).out
    assert json.loads((tmp_path / "again" / "config.json").read_text())["head_values"] == "int8"
    convert(tmp_path / "out", tmp_path / "dense", output="dense")
    assert "head_values" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    for options in (["--lm-head", "int4"], ["--lm-head", "int8", "--format", "dense"]):
        refused = cli("convert", tiny_opt, "--nm", "2:4", *options, "--out", tmp_path / "no")
        assert refused.code == 2
        assert "the output head can be int8 in a packed checkpoint" in refused.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"head_values": "int2"}))
    with pytest.raises(CheckpointError, match="head_values is 'int2'"):
        SparseOPTForCausalLM.from_pretrained(tmp_path / "out")
    model.config.head_values = "int2"
    with pytest.raises(InputError, match="head_values is 'int2'"):
        model.generate(torch.arange(5, 9)[None], max_new_tokens=1)


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_a_quantised_model_generates_what_its_logits_favour(
    tiny_opt: Path, values: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of unequal length through the engine's prefill and step: the exact model finds hardly a better token than each."""
    monkeypatch.setenv("SPARSE_ENGINE_GENERATE", "engine")
    for dtype in (torch.float32, torch.bfloat16):
        model = load(tiny_opt, {"nm": "2:4", "values": values}, dtype)
        ids = torch.randint(4, 300, (3, 12), generator=torch.Generator().manual_seed(5))
        mask = (torch.arange(12) >= torch.tensor([0, 4, 9])[:, None]).long()
        ids = torch.where(mask == 1, ids, 1)
        got = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert model.generation_path == "engine (native cpu step)"
        whole = torch.cat([mask, torch.ones(3, 8, dtype=torch.int64)], 1)
        with torch.inference_mode():
            logits = exact(model)(got, attention_mask=whole).logits[:, 11:-1]
        ahead = logits.amax(-1) - logits.gather(2, got[:, 12:, None])[..., 0]
        assert float(ahead.max()) < 0.1 * float(logits.std())


def test_what_a_step_cannot_do_is_said_and_nothing_is_written(tiny_opt: Path) -> None:
    model = load(tiny_opt, None)
    description = Description(model)
    decoder = Decoder(description, 2, 200)
    keys, values = poisoned(description, 2, 200)
    tokens, zeros = torch.tensor([5, 6]), torch.zeros(2, dtype=torch.int64)

    def refused(message: str, tokens: Tensor = tokens, starts: Tensor = zeros, lengths: Tensor = zeros, slots: int = 200) -> None:
        with pytest.raises(InputError, match=message):
            decoder.step(tokens, starts, lengths, keys[:, :, :, :slots], values[:, :, :, :slots])
        assert bool(torch.isnan(keys).all())

    refused("the cache of 200 tokens is full", lengths=torch.tensor([3, 200]))
    refused("the model has 128 positions, and a sequence would have 129 tokens", lengths=torch.tensor([0, 128]))
    refused("a sequence ends before it starts", starts=torch.tensor([0, 4]), lengths=torch.tensor([0, 3]))
    refused("a sequence ends before it starts", starts=torch.tensor([0, -1]))
    refused("token ids are 0 to 319, got 5 to 320", tokens=torch.tensor([5, 320]))
    refused("token ids are 0 to 319, got -1 to 6", tokens=torch.tensor([-1, 6]))
    refused("expected contiguous", slots=100)
    with pytest.raises(InputError, match="the decoder was made for 2 sequences in 200 slots, got 3 in 200"):
        decoder.step(torch.tensor([5, 6, 7]), torch.zeros(3), torch.zeros(3), *poisoned(description, 3, 200))
    with pytest.raises(InputError, match="reads no float64 embeddings"):
        Description(OPTForCausalLM(model.config).double())
    assert bool(
        torch.isfinite(
            decoder.step(tokens, torch.tensor([0, 72]), torch.tensor([127, 199]), *(torch.zeros_like(t) for t in (keys, values)))
        ).all()
    )
