"""What the tests of decode steps share: a small model, and a session in the middle of its work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from products import relative_error
from torch import Tensor
from transformers import OPTForCausalLM
from transformers.models.opt.configuration_opt import OPTConfig

from sparse_engine import SparseOPTForCausalLM
from sparse_engine.engine.choice import Choice
from sparse_engine.engine.runner import Cache, Runner, Session, runner_for


def small_opt(pattern: str, **settings: Any) -> Any:
    """Three layers of four heads of 64, trained on nothing, with weights of an N:M pattern or an unstructured sparsity ("0.5")."""
    torch.manual_seed(0)
    fields_ = {"hidden_size": 256, "ffn_dim": 768, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": 256}
    fields_ |= {"vocab_size": 323, "max_position_embeddings": 640, "dtype": torch.bfloat16} | settings
    config = OPTConfig(**fields_)
    dense = OPTForCausalLM(config).to(config.dtype)
    for parameter in dense.parameters():
        # Larger than at the start of a training, so that logits and attention have something to tell.
        parameter.data += torch.randn_like(parameter) * 0.05
    return SparseOPTForCausalLM.from_dense(dense, **({"nm": pattern} if ":" in pattern else {"sparsity": float(pattern)}))


def admitted(runner: Runner, prompt: int, new: int) -> Any:
    """A session of one row with ``prompt`` tokens in its cache, of random keys and values, the last of them still to be run."""
    session = runner.session(1, prompt + new, Choice(), eos=[], pad=1)
    generator = torch.Generator("cuda").manual_seed(prompt)
    session.cache.k.normal_(generator=generator)
    session.cache.v.normal_(generator=generator)
    state = session.state
    for tensor, value in ((state.lengths, prompt - 1), (state.filled, prompt), (state.limits, prompt + new), (state.tokens, 123)):
        tensor.fill_(value)
    state.finished.fill_(False)
    return session


def copied(cache: Cache) -> Cache:
    """A cache of the same content that shares nothing with ``cache``."""
    state = cache.state
    tensors = {f.name: v.clone() if isinstance(v := getattr(state, f.name), Tensor) else v for f in fields(state)}
    return Cache(cache.k.clone(), cache.v.clone(), replace(state, **tensors))


def finished_session(runner: Any) -> tuple[Session, Cache]:
    """A session whose only row has finished where its cache ends, and a copy of the cache."""
    session = admitted(runner, 30, 98)
    state = session.cache.state
    state.finished.fill_(True)
    state.lengths.fill_(session.cache.capacity)
    return session, copied(session.cache)


def assert_a_finished_row_stays(runner: Any, step: Callable[[Session], object]) -> tuple[Session, Cache]:
    """Runs ``step`` on a :func:`finished_session`, which it leaves as it was but for a token, the pad; gives the session and the copy."""
    session, before = finished_session(runner)
    step(session)
    cache = session.cache
    assert torch.equal(cache.k, before.k)
    assert torch.equal(cache.v, before.v)
    assert int(cache.state.tokens[0]) == cache.state.pad
    assert int(cache.state.lengths[0]) == cache.capacity
    return session, before


def assert_same_step(found: Tensor, cache: Cache, expected: Tensor, before: Cache) -> None:
    """``found`` logits and what a step left in ``cache`` are near the ``expected`` ones and what the other step left in ``before``."""
    assert relative_error(found, expected.double()) < (2e-2 if cache.k.dtype is torch.bfloat16 else 3e-3)
    assert relative_error(cache.k, before.k.double()) < 1e-2
    assert relative_error(cache.v, before.v.double()) < 1e-2


def assert_steps_match_the_kernels_one_by_one(runner: Any, scratch: Sequence[Tensor]) -> None:
    """Steps of a GPU runner behind prompts of many lengths are near those of the base class; ``scratch``, poisoned, is not read before
    it is written."""
    for prompt in (1, 2, 63, 64, 65, 200, 513, 600):
        session = admitted(runner, prompt, 8)
        for _ in range(3):
            before, cache = copied(session.cache), session.cache
            for tensor in scratch:
                tensor.fill_(float("nan"))
            found = runner.logits(cache)
            assert_same_step(found, cache, Runner.logits(runner, before), before)
            session.step()


def same_generation_with_and_without(attribute: str, path: str, pattern: str = "2:4") -> None:
    """Options of ``generate`` give the same tokens with what a GPU runner has as ``attribute``, whose path is ``path``, and without it."""
    model = small_opt(pattern, dtype=torch.float16).to("cuda").eval()
    ids = torch.randint(4, 300, (1, 37), generator=torch.Generator().manual_seed(3)).cuda()
    runner: Any = runner_for(model)
    cases: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.4}, {"eos_token_id": None}, {"do_sample": True, "top_k": 1}]
    found = []
    for single in (getattr(runner, attribute), None):
        setattr(runner, attribute, single)
        runner._kept.clear()
        outputs = [model.generate(ids, **({"max_new_tokens": 40, "do_sample": False} | case)).tolist() for case in cases]
        assert model.generation_path == f"engine ({path if single else 'cuda graphs'})"
        found.append(outputs)
    assert found[0] == found[1]
