"""A prompt's pass with other tokens behind it, and as a graph: what it leaves is what the prompt alone leaves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_engine import EngineOPTForCausalLM, SparseOPTForCausalLM
from sparse_engine.engine.generation import VARIABLE
from sparse_engine.engine.prefill import PromptBatch, pass_through
from sparse_engine.engine.prompt_graphs import PromptGraphs, bucket_of
from sparse_engine.engine.runner import runner_for


def test_buckets_hold_their_prompts() -> None:
    for tokens in range(1, 4097):
        bucket = bucket_of(tokens)
        assert bucket is not None
        assert tokens <= bucket <= max(2 * tokens, tokens + 128, 16)
        assert bucket_of(bucket) == bucket
    assert bucket_of(4097) is None


@pytest.mark.parametrize("architecture", ["tiny_opt", "tiny_opt_350m"])
def test_what_follows_a_prompt_changes_nothing(architecture: str, request: pytest.FixtureRequest) -> None:
    model: Any = EngineOPTForCausalLM.from_pretrained(request.getfixturevalue(architecture))
    runner = runner_for(model.eval(), forced=True)
    assert not isinstance(runner, str)
    weights = runner.weights
    shape = (len(weights.layers), 2, weights.heads, 40, weights.head_size)
    caches = [torch.zeros(shape) for _ in range(4)]
    prompt = torch.randint(4, 200, (11,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = PromptBatch.of([1], [prompt], torch.device("cpu"))
        expected = pass_through(weights, caches[0], caches[1], alone)
        longer = PromptBatch.of([1], [torch.cat([prompt, torch.full((21,), 5)])], torch.device("cpu"))
        found = pass_through(weights, caches[2], caches[3], dataclasses.replace(longer, lasts=alone.lasts))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in ((0, 2), (1, 3)):
        torch.testing.assert_close(caches[other][..., :11, :], caches[one][..., :11, :], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["dense", "2:4", "0.5"])
def test_tokens_are_those_of_transformers(pattern: str, tiny_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if pattern == "dense":
        model: Any = EngineOPTForCausalLM.from_pretrained(tiny_opt)
    else:
        settings: dict[str, Any] = {"sparsity": 0.5} if pattern == "0.5" else {"nm": pattern}
        model = SparseOPTForCausalLM.from_pretrained(tiny_opt, **settings)
    model = model.to("cuda").eval()
    replayed: list[int] = []
    original = PromptGraphs.__call__

    def counted(self: PromptGraphs, row: int, prompt: torch.Tensor, bucket: int) -> torch.Tensor:
        replayed.append(bucket)
        return original(self, row, prompt, bucket)

    monkeypatch.setattr(PromptGraphs, "__call__", counted)
    # Longer and shorter ones of a bucket in turn; the last two are longer than the model's positions less a bucket.
    lengths = [7, 16, 3, 40, 60, 33, 12, 100, 118, 100]
    generator = torch.Generator().manual_seed(1)
    for length in lengths:
        ids = torch.randint(4, 200, (1, length), generator=generator).cuda()
        found = []
        for wanted in ("transformers", "engine"):
            monkeypatch.setenv(VARIABLE, wanted)
            mode = torch.inference_mode() if length == 16 else torch.no_grad()
            with mode:
                found.append(model.generate(input_ids=ids, max_new_tokens=9, do_sample=False).cpu())
            assert model.generation_path.startswith(wanted)
        assert torch.equal(*found), length
    assert replayed == [16, 16, 64, 64, 16, 128, 128]


@pytest.mark.gpu
def test_rows_of_a_batch_are_admitted_alone(tiny_opt: Path) -> None:
    model: Any = SparseOPTForCausalLM.from_pretrained(tiny_opt, nm="2:4").to("cuda").eval()
    runner = runner_for(model)
    assert not isinstance(runner, str)
    cache = runner.allocate(4, 128, 1)
    prompts = [torch.randint(4, 200, (length,), device="cuda") for length in (9, 14, 11)]
    with torch.no_grad():
        expected = runner.prefill(cache, [0, 1, 2], prompts)
        keys = cache.k.clone()
        cache.k.fill_(float("nan"))
        for turn in range(2):
            for row, prompt in enumerate(prompts):
                torch.testing.assert_close(runner.prefill(cache, [row], [prompt])[0], expected[row], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(cache.k[:, row, :, : len(prompt)], keys[:, row, :, : len(prompt)], rtol=1e-4, atol=1e-4)
            assert bool(cache.k[:, 3].isnan().all()), turn


@pytest.mark.gpu
def test_a_prompt_is_read_without_a_graph_where_there_is_no_room_for_one(tiny_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = SparseOPTForCausalLM.from_pretrained(tiny_opt, nm="2:4").to("cuda").eval()
    runner = runner_for(model)
    assert not isinstance(runner, str)
    cache, prompt = runner.allocate(1, 128, 1), torch.randint(4, 200, (9,), device="cuda")
    tried: list[int] = []

    def full(self: PromptGraphs, given: PromptBatch, bucket: int) -> None:
        tried.append(bucket)
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(PromptGraphs, "_capture", full)
    with torch.no_grad():
        first, *others = (runner.prefill(cache, [0], [prompt]) for _ in range(3))
    assert tried == [16], "once"
    assert all(torch.equal(first, other) for other in others)
