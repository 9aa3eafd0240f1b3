"""Whole OPT models of the real shapes with random weights, dense or packed, made on the device that they are measured on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.opt.configuration_opt import OPTConfig

from sparse_engine.bench.shapes import HIDDEN, PATTERNS, random_packed
from sparse_engine.hf import EngineOPTForCausalLM
from sparse_engine.linear import SparseLinear
from sparse_engine.pattern import SparsityPattern
from sparse_engine.value_types import PLAIN

__all__ = ["DEPTH", "opt_config", "random_model"]

DEPTH = {
    "opt-125m": (12, 12),
    "opt-350m": (24, 16),
    "opt-1.3b": (24, 32),
    "opt-2.7b": (32, 32),
    "opt-6.7b": (32, 32),
    "opt-13b": (40, 40),
    "opt-30b": (48, 56),
    "opt-66b": (64, 72),
}
"""Layers and heads (Zhang et al. 2022, table 1)."""

_SPREAD = 0.02


def opt_config(model: str) -> OPTConfig:
    """The configuration of one of Meta's models by its name ("opt-125m")."""
    hidden, (layers, heads) = HIDDEN[model], DEPTH[model]
    projected: dict[str, Any] = {"word_embed_proj_dim": 512, "do_layer_norm_before": False} if model == "opt-350m" else {}
    sizes: dict[str, Any] = {"hidden_size": hidden, "ffn_dim": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return OPTConfig(vocab_size=50272, max_position_embeddings=2048, dropout=0.0, **sizes, **projected)


@torch.no_grad()
def random_model(model: str, pattern: str, dtype: torch.dtype, device: torch.device | str, *, value_type: str = PLAIN) -> Any:
    """An OPT with normal weights whose decoder linears follow ``pattern``: "dense" or a key of ``PATTERNS``, of values of a type."""
    config = opt_config(model)
    with torch.device("meta"):
        made: Any = EngineOPTForCausalLM(config)
    made = made.to(dtype)
    linears = {name: module for name, module in made.named_modules() if isinstance(module, nn.Linear) and ".layers." in name}
    if pattern != "dense":
        for name, linear in linears.items():
            shape = (linear.out_features, linear.in_features)
            packed = random_packed(shape, SparsityPattern.parse(PATTERNS[pattern]), dtype, str(device), value_type=value_type)
            bias = torch.randn(linear.out_features, dtype=dtype, device=device) * _SPREAD
            layer = SparseLinear.from_packed(packed, bias)
            layer.plan()
            made.set_submodule(name, layer)
    for module in made.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and module is not made.lm_head:
                values = torch.randn(parameter.shape, dtype=dtype, device=device) * _SPREAD
                if isinstance(module, nn.LayerNorm) and name == "weight":
                    values += 1
                setattr(module, name, nn.Parameter(values, requires_grad=False))
    made.lm_head.weight = made.model.decoder.embed_tokens.weight
    return made.eval()
