"""Continuous batching: the tokens of each prompt are those it gets alone, whatever enters and leaves beside it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_engine import EngineOPTForCausalLM, SparseOPTForCausalLM
from sparse_engine.cli import summarize
from sparse_engine.engine.choice import Choice
from sparse_engine.engine.generation import VARIABLE
from sparse_engine.engine.many import AUTO_ROWS, auto_batch, generate_many
from sparse_engine.engine.runner import MAX_BATCH, runner_for
from sparse_engine.errors import InputError

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def model(request: pytest.FixtureRequest, tiny_opt: Path) -> Any:
    made = SparseOPTForCausalLM.from_pretrained(tiny_opt, nm="2:4").to(request.param).eval()
    # Some of the tokens that the tiny model likes end a row, so that rows end at different steps.
    made.generation_config.eos_token_id = [2, *range(30, 300, 7)]
    return made


def prompts(count: int, most: int = 40) -> list[list[int]]:
    rng = random.Random(count)  # noqa: S311 (not secrets)
    return [[rng.randrange(4, 290) for _ in range(rng.randrange(1, most))] for _ in range(count)]


def alone(model: Any, prompt: list[int], tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setenv(VARIABLE, "transformers")
    ids = torch.tensor([prompt], device=model.device)
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, no_repeat_ngram_size=1)[
        0, len(prompt) :
    ].tolist()


@pytest.mark.parametrize("batch", [1, 3, 8, None])
def test_every_prompt_gets_its_own_tokens(model: Any, batch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = prompts(11)
    seen: list[int] = []

    def track(items: Any, description: str, total: int) -> Any:
        assert total == len(texts)
        for item in items:
            seen.append(item[0])
            yield item

    # Without repeats the tiny model's tokens vary, and some of them end a row.
    got = generate_many(model, texts, max_new_tokens=21, batch=batch, choice=Choice(no_repeat_ngram_size=1), track=track)
    assert sorted(seen) == list(range(11))
    want = [alone(model, text, 21, monkeypatch) for text in texts]
    assert got == want
    assert len({len(tokens) for tokens in want}) > 2, "rows end at different steps"


def test_a_stop_ends_rows_and_drops_what_is_behind(model: Any) -> None:
    texts = prompts(5)
    free = generate_many(model, texts, max_new_tokens=30)
    got = generate_many(model, texts, max_new_tokens=30, batch=2, stop=lambda tokens: 5 if len(tokens) >= 5 else None)
    assert got == [tokens[:5] for tokens in free]


def test_positions_and_refusals(model: Any, tiny_opt: Path) -> None:
    positions = model.config.max_position_embeddings
    long = prompts(1)[0] * positions
    model.generation_config.eos_token_id, kept = None, model.generation_config.eos_token_id
    try:
        (got,) = generate_many(model, [long[: positions - 2]], max_new_tokens=50)
    finally:
        model.generation_config.eos_token_id = kept
    assert len(got) <= 3
    for wrong in ([], long[:positions]):
        with pytest.raises(InputError, match=f"prompt 1 has {len(wrong)} tokens"):
            generate_many(model, [[5], wrong], max_new_tokens=3)
    assert generate_many(model, [], max_new_tokens=3) == []
    training = EngineOPTForCausalLM.from_pretrained(tiny_opt).train()
    with pytest.raises(InputError, match="it is in training mode"):
        generate_many(training, [[5]], max_new_tokens=3)


def test_automatic_batch(model: Any) -> None:
    runner = runner_for(model, forced=True)
    assert not isinstance(runner, str)
    assert auto_batch(runner, prompts(9), 8) == 9
    assert auto_batch(runner, [[5]] * 1000, 8) == AUTO_ROWS[model.device.type]
    assert summarize._MOST == MAX_BATCH
