"""What the tests of decode steps share: a small model, and a session in the middle of its work."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import OPTForCausalLM
from transformers.models.opt.configuration_opt import OPTConfig

from sparse_engine import SparseOPTForCausalLM
from sparse_engine.engine.choice import Choice
from sparse_engine.engine.runner import Cache, Runner


def small_opt(nm: str, **settings: Any) -> Any:
    """Three layers of four heads of 64, trained on nothing."""
    torch.manual_seed(0)
    fields_ = {"hidden_size": 256, "ffn_dim": 768, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": 256}
    fields_ |= {"vocab_size": 323, "max_position_embeddings": 640, "dtype": torch.bfloat16} | settings
    config = OPTConfig(**fields_)
    dense = OPTForCausalLM(config).to(config.dtype)
    for parameter in dense.parameters():
        # Larger than at the start of a training, so that logits and attention have something to tell.
        parameter.data += torch.randn_like(parameter) * 0.05
    return SparseOPTForCausalLM.from_dense(dense, nm=nm)


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
