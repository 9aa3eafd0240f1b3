"""The engine's generation against transformers' own loop: same tokens over options, prompts and batch shapes, and its refusals."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from sparse_engine import EngineOPTForCausalLM, SparseOPTForCausalLM
from sparse_engine.engine.cpu import _Product
from sparse_engine.engine.generation import VARIABLE
from sparse_engine.engine.runner import runner_for
from sparse_engine.errors import InputError
from sparse_engine.hf.loading import load_tokenizer

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
MODELS = ("dense", "2:4", "0.5", "post-norm")


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, device: str, tiny_opt: Path, tiny_opt_350m: Path) -> Any:
    torch.manual_seed(0)
    match request.param:
        case "dense":
            made: Any = EngineOPTForCausalLM.from_pretrained(tiny_opt)
        case "post-norm":
            made = EngineOPTForCausalLM.from_pretrained(tiny_opt_350m)
        case "0.5":
            made = SparseOPTForCausalLM.from_pretrained(tiny_opt, sparsity=0.5)
        case pattern:
            made = SparseOPTForCausalLM.from_pretrained(tiny_opt, nm=pattern)
    return made.to(device).eval()


def padded(model: Any, lengths: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    width, pad = max(lengths), model.config.pad_token_id
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), width), pad)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(4, 200, (length,), generator=generator)
        mask[row, width - length :] = 1
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def both(model: Any, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = []
    for wanted in ("transformers", "engine"):
        monkeypatch.setenv(VARIABLE, wanted)
        fresh = {key: value() if callable(value) and key == "streamer" else value for key, value in arguments.items()}
        outputs.append(model.generate(**fresh))
        assert model.generation_path.startswith(wanted)
    return outputs[0], outputs[1]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition": {"repetition_penalty": 1.7},
    "ngrams": {"no_repeat_ngram_size": 2},
    "both": {"repetition_penalty": 0.8, "no_repeat_ngram_size": 3},
    "least": {"min_new_tokens": 9},
    "least-length": {"min_length": 20},
    "never-ends": {"eos_token_id": None},
    "several-ends": {"eos_token_id": [2, 7, 11, 90, 150, 151, 152]},
    "length": {"max_new_tokens": None, "max_length": 24},
    "one": {"max_new_tokens": 1},
    "top-1": {"do_sample": True, "top_k": 1, "temperature": 0.7, "top_p": 0.9},
}


@pytest.mark.parametrize("lengths", [(5,), (1,), (9, 3, 9, 1, 6)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_tokens_as_transformers(
    model: Any, lengths: tuple[int, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"max_new_tokens": 20, "do_sample": False} | options
    want, got = both(model, monkeypatch, **padded(model, lengths), **arguments)
    assert got.device == want.device
    assert got.tolist() == want.tolist()


def test_64_rows_that_end_at_different_steps(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = tuple(1 + 5 * i % 12 for i in range(64))
    ends = [2, *range(30, 300, 7)]
    # Without repeats the tiny model's tokens vary, and some of them end a row.
    options = {"max_new_tokens": 20, "do_sample": False, "no_repeat_ngram_size": 1, "eos_token_id": ends, "pad_token_id": 1}
    want, got = both(model, monkeypatch, **padded(model, lengths), **options)
    assert len(set((want[:, max(lengths) :] != 1).sum(1).tolist())) > 2, "rows end at different steps"
    assert got.tolist() == want.tolist()


def test_stop_strings_and_criteria_end_rows_where_transformers_does(model: Any, tiny_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(tiny_opt)
    inputs = padded(model, (4, 7, 2))
    monkeypatch.setenv(VARIABLE, "transformers")
    free = model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None)
    text = tokenizer.decode(free[1, 10:13])
    assert text
    for eos in (None, 2):
        want, got = both(
            model, monkeypatch, **inputs, max_new_tokens=16, do_sample=False, eos_token_id=eos, stop_strings=[text], tokenizer=tokenizer
        )
        assert got.tolist() == want.tolist()

    class Odd(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return input_ids[:, -1] % 3 == 0

    want, got = both(model, monkeypatch, **inputs, max_new_tokens=16, do_sample=False, stopping_criteria=StoppingCriteriaList([Odd()]))
    assert got.tolist() == want.tolist()


class Recorder:
    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_streams_the_same_tokens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorders = []
    for wanted in ("transformers", "engine"):
        monkeypatch.setenv(VARIABLE, wanted)
        recorders.append(Recorder())
        model.generate(**padded(model, (6,)), max_new_tokens=12, do_sample=False, streamer=recorders[-1])
    assert recorders[0].seen == recorders[1].seen
    assert [recorder.ended for recorder in recorders] == [1, 1]


def test_draws_from_the_distribution_that_the_warpers_leave(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "engine")
    inputs = padded(model, (5,))
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].float().cpu()
    kept = logits.topk(3)
    expected = (kept.values / 1.3).softmax(-1)
    torch.manual_seed(1)
    many = {name: tensor.expand(200, -1) for name, tensor in inputs.items()}
    drawn = [model.generate(**many, max_new_tokens=1, do_sample=True, top_k=3, temperature=1.3)[:, -1].cpu() for _ in range(5)]
    counts = torch.stack([(torch.cat(drawn) == token).float().mean() for token in kept.indices])
    assert round(float(counts.sum()) * 1000) == 1000, "nothing but the three likeliest is drawn"
    assert (counts - expected).abs().max() < 0.06  # four standard deviations of 1000 draws
    torch.manual_seed(1)
    again = model.generate(**many, max_new_tokens=1, do_sample=True, top_k=3, temperature=1.3)[:, -1].cpu()
    assert torch.equal(again, drawn[0]), "the seed decides the draws"


class Nothing(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


def test_leaves_to_transformers_what_it_has_not(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = padded(model, (5, 3))
    right = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"].flip(1)}
    refused: list[tuple[str, dict[str, Any]]] = [
        ("the logits processor Nothing is asked for", {"logits_processor": LogitsProcessorList([Nothing()])}),
        ("scores or a dictionary are asked for", {"return_dict_in_generate": True}),
        ("use_cache is off", {"use_cache": False}),
        ("the attention mask hides more than padding on the left", right),
    ]
    for reason, options in refused:
        arguments = {**inputs, "max_new_tokens": 3, "do_sample": False, **options}
        monkeypatch.setenv(VARIABLE, "auto")
        model.generate(**arguments)
        assert model.generation_path == f"transformers, since {reason}"
        monkeypatch.setenv(VARIABLE, "engine")
        with pytest.raises(InputError, match=reason):
            model.generate(**arguments)
    monkeypatch.setenv(VARIABLE, "auto")
    beams = {**inputs, "max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    model.generate(**beams)
    assert model.generation_path == "transformers, since beam search is asked for"
    looked_up = {"input_ids": inputs["input_ids"][:1], "prompt_lookup_num_tokens": 2, "max_new_tokens": 3, "do_sample": False}
    model.generate(**looked_up)
    assert model.generation_path == "transformers, since assisted decoding is asked for"
    monkeypatch.setenv(VARIABLE, "engine")
    for arguments in (beams, looked_up):
        with pytest.raises(InputError, match=r"(beam search|assisted decoding) is asked for; .*=auto leaves it to transformers"):
            model.generate(**arguments)
    monkeypatch.setenv(VARIABLE, "sometimes")
    with pytest.raises(InputError, match="use auto, engine or transformers"):
        model.generate(**inputs, max_new_tokens=3)


def test_prompts_that_no_model_has(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in ("auto", "engine"):
        monkeypatch.setenv(VARIABLE, wanted)
        for shape in ((1, 0), (0, 3)):
            with pytest.raises(InputError, match=r"there is no prompt: input_ids of shape \(\d, \d\) hold no token"):
                model.generate(input_ids=torch.empty(*shape, dtype=torch.int64, device=model.device), max_new_tokens=3, do_sample=False)
        for token in (-3, model.config.vocab_size):
            ids = torch.tensor([[5, token]], device=model.device)
            with pytest.raises(InputError, match=f"the prompt has the token {token}, and the model's are 0 to"):
                model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)


def test_positions_end_with_a_sentence(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "engine")
    positions = model.config.max_position_embeddings
    inputs = padded(model, (positions - 3, 4))
    got = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert got.shape[1] == positions + 1  # the last token is chosen at the last position and never run
    with pytest.raises(InputError, match=f"row 0 reached the model's {positions} positions"):
        model.generate(**inputs, max_new_tokens=9, do_sample=False, eos_token_id=None)
    with pytest.raises(InputError, match="leaves no room"):
        model.generate(**padded(model, (positions + 1,)), max_new_tokens=1, do_sample=False)


def test_weights_that_change_are_seen(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "engine")
    twin = copy.deepcopy(model)
    inputs = padded(twin, (6, 2))
    first = runner_for(twin, forced=True)
    twin.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert runner_for(twin, forced=True) is first
    twin.to(torch.float16).to(torch.float32)
    want, got = both(twin, monkeypatch, **inputs, max_new_tokens=12, do_sample=False)
    assert got.tolist() == want.tolist()
    assert runner_for(twin, forced=True) is not first
    twin.train()
    assert runner_for(twin, forced=True) == "is in training mode; call eval()"


def test_logits_in_bf16_are_near_those_of_float32(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step over one text, since a rounding error may turn a greedy choice."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    runner = runner_for(half, forced=True)
    assert not isinstance(runner, str)
    from sparse_engine.engine.choice import Choice

    ids = padded(model, (24,))["input_ids"]
    session = runner.session(1, 32, Choice(), eos=[], pad=1)
    session.admit([0], [ids[0, :8]], [30])
    with torch.no_grad():
        want = model(ids).logits[0].float()
    scale = want.norm(dim=-1).max()
    for position in range(8, 24):
        session.state.tokens.fill_(int(ids[0, position]))
        session.state.lengths.fill_(position)
        with torch.no_grad():
            got = runner.logits(session.cache)[0].float()
        assert (got - want[position]).norm() < 0.03 * scale


def test_generation_config_of_the_model_is_heard(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        model.generate(**padded(model, (3, 8)), max_new_tokens=3, do_sample=False)
    config = GenerationConfig(max_new_tokens=7, do_sample=False, repetition_penalty=1.3, eos_token_id=2, pad_token_id=1)
    want, got = both(model, monkeypatch, **padded(model, (3, 8)), generation_config=config)
    assert got.tolist() == want.tolist()


class Interrupt:
    """A streamer that is interrupted at its third token."""

    def __init__(self) -> None:
        self.left = 3

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def end(self) -> None:
        raise AssertionError("not reached")


def test_an_interrupted_generation_leaves_the_next_one_whole(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = padded(model, (6,))
    monkeypatch.setenv(VARIABLE, "engine")
    with pytest.raises(KeyboardInterrupt):
        model.generate(**inputs, max_new_tokens=12, do_sample=False, streamer=Interrupt())
    want, got = both(model, monkeypatch, **inputs, max_new_tokens=12, do_sample=False)
    assert got.tolist() == want.tolist()


def test_models_of_one_process_do_not_meet(model: Any, tiny_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    other = EngineOPTForCausalLM.from_pretrained(tiny_opt).to(model.device).eval()
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    inputs = padded(model, (6, 2))
    for one in (model, other, model):
        want, got = both(one, monkeypatch, **inputs, max_new_tokens=8, do_sample=False)
        assert got.tolist() == want.tolist()
    runner = runner_for(other, forced=True)
    alive = weakref.ref(runner)
    del other, one, runner
    gc.collect()
    assert alive() is None, "a model's runner lives as long as the model"


@pytest.mark.gpu
def test_memory_does_not_grow(tiny_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "engine")
    model = SparseOPTForCausalLM.from_pretrained(tiny_opt, nm="2:4").to("cuda").eval()
    held = []
    for turn in range(1000):
        model.generate(**padded(model, (4 + turn % 9,)), max_new_tokens=2 + turn % 5, do_sample=False)
        if turn in (100, 999):
            gc.collect()
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated())
    assert held[1] <= held[0]


def test_prompts_of_all_lengths_are_products_of_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(24, 7, dtype=torch.bfloat16)
    product, seen, linear = _Product(layer, torch.bfloat16), set(), F.linear

    def noted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.add(len(x))
        return linear(x, *rest)

    for rows in range(1, 100):
        x = torch.randn(rows, 24)
        with monkeypatch.context() as context:
            context.setattr(F, "linear", noted)
            got = product(x)
        assert got.shape == (rows, 7)
        torch.testing.assert_close(got, layer(x.bfloat16()), rtol=2e-2, atol=2e-2)
    assert seen == {32, 64, 96, 128}
