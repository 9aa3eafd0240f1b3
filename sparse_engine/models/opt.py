"""OPT (Zhang et al. 2022), 125m to 66b, with OPT-350m's post-norm layers and its project_in and project_out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparse_engine.errors import CheckpointError
from sparse_engine.models import register
from sparse_engine.models.base import ModelFamily

_LINEAR = re.compile(r"model\.decoder\.layers\.(\d+)\.(self_attn\.(?:q|k|v|out)_proj|fc1|fc2)")
_SIZES = ("hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
_POSITION_OFFSET = 2
_LARGEST = 1 << 20


class OPTFamily(ModelFamily):
    model_types = ("opt", "sparse_opt")
    linear_groups: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    )

    def validate(self, config: Mapping[str, Any]) -> None:
        for key in _SIZES:
            value = config.get(key)
            if not isinstance(value, int) or not 0 < value <= _LARGEST:
                raise CheckpointError(f"config.json: {key} must be a whole number from 1 to {_LARGEST}, got {value!r}")
        if config["hidden_size"] % config["num_attention_heads"]:
            raise CheckpointError(
                f"config.json: hidden_size {config['hidden_size']} is no multiple of {config['num_attention_heads']} heads"
            )

    def canonical(self, name: str) -> str:
        return f"model.{name}" if name.startswith("decoder.") else name

    def layer_count(self, config: Mapping[str, Any]) -> int:
        return int(config["num_hidden_layers"])

    def layer_prefix(self, index: int) -> str:
        return f"model.decoder.layers.{index}"

    def linear_shape(self, config: Mapping[str, Any], linear: str) -> tuple[int, int]:
        match = _LINEAR.fullmatch(linear)
        if match is None or int(match[1]) >= self.layer_count(config):
            raise CheckpointError(f"an OPT model of {self.layer_count(config)} layers has no decoder linear {linear!r}")
        hidden, ffn = int(config["hidden_size"]), int(config["ffn_dim"])
        return {"fc1": (ffn, hidden), "fc2": (hidden, ffn)}.get(match[2], (hidden, hidden))

    def drops(self, config: Mapping[str, Any], name: str) -> bool:
        return name == "lm_head.weight" and bool(config.get("tie_word_embeddings", True))

    def max_length(self, config: Mapping[str, Any]) -> int:
        return int(config["max_position_embeddings"])

    def dense_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in config.items() if key not in ("quantization_config", "head_values")}
        return kept | {"model_type": "opt", "architectures": ["OPTForCausalLM"]}

    def embed(self, config: Mapping[str, Any], tensor: Callable[[str], Tensor], *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        project = (
            tensor("model.decoder.project_in.weight")
            if config.get("word_embed_proj_dim", config["hidden_size"]) != config["hidden_size"]
            else None
        )
        tokens, positions = tensor("model.decoder.embed_tokens.weight"), tensor("model.decoder.embed_positions.weight")
        return _Embedding(tokens, positions, project).to(device=device, dtype=dtype)

    def build_layer(self, config: Mapping[str, Any], index: int, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        from transformers.models.opt.configuration_opt import OPTConfig
        from transformers.models.opt.modeling_opt import OPTDecoderLayer

        settings = OPTConfig(**self.dense_config(config))
        settings._attn_implementation = "sdpa"
        with torch.device("meta"):
            layer = OPTDecoderLayer(settings, layer_idx=0)
        return layer.to(dtype).to_empty(device=device).eval()

    def run_layer(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        # Without a mask and without padding, scaled-dot-product attention runs causally by itself.
        output: Tensor = layer(hidden)
        return output


class _Embedding(nn.Module):
    def __init__(self, tokens: Tensor, positions: Tensor, project_in: Tensor | None) -> None:
        super().__init__()
        self.tokens = nn.Parameter(tokens, requires_grad=False)
        self.positions = nn.Parameter(positions, requires_grad=False)
        self.project_in = None if project_in is None else nn.Parameter(project_in, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = nn.functional.embedding(ids, self.tokens)
        if self.project_in is not None:
            embedded = nn.functional.linear(embedded, self.project_in)
        places = torch.arange(ids.shape[1], device=ids.device) + _POSITION_OFFSET
        return embedded + nn.functional.embedding(places, self.positions)


register(OPTFamily())
