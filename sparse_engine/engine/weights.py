"""The tensors and products of an OPT decoder as the engine reads them, and why a model is not one that it can run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.engine.product import HeadProduct, Int8Product, Product, product, stacked
from sparse_engine.errors import InputError
from sparse_engine.linear import SparseLinear

__all__ = ["DecoderLayer", "DecoderWeights", "LayerNormWeights", "fingerprint", "plans", "why_not"]

_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")


@dataclass(frozen=True, slots=True)
class LayerNormWeights:
    """weight and bias (H,), and eps."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """The LayerNorm of x (..., H), by torch."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    @classmethod
    def of(cls, module: nn.LayerNorm) -> LayerNormWeights:
        return cls(module.weight.detach(), module.bias.detach(), module.eps)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Zhang et al. 2022, "OPT", section 2.1: attention and a ReLU network, each with a LayerNorm before it (OPT-350m: behind it)."""

    attention_norm: LayerNormWeights
    qkv: Product
    out: Product
    ffn_norm: LayerNormWeights
    fc1: Product
    fc2: Product


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A decoder: token table (V, E), position table (P + 2, H), its layers, and the product with the (tied) head.

    ``project_in`` and ``project_out`` are there where E differs from the layers' width H.
    """

    tokens: Tensor
    positions: Tensor
    project_in: Product | None
    layers: tuple[DecoderLayer, ...]
    norm_first: bool
    final_norm: LayerNormWeights | None
    project_out: Product | None
    head: Product
    heads: int
    hidden: int

    @classmethod
    def of(cls, model: Any) -> DecoderWeights:
        """Read a model for which :func:`why_not` has no objection; q, k and v of each layer then share one stacked weight.

        Raises:
            InputError: the config asks for an output head of an unknown type.
        """
        decoder, config = model.model.decoder, model.config
        layers = []
        for layer in decoder.layers:
            attention = layer.self_attn
            layers.append(
                DecoderLayer(
                    LayerNormWeights.of(layer.self_attn_layer_norm),
                    stacked((attention.q_proj, attention.k_proj, attention.v_proj)),
                    product(attention.out_proj),
                    LayerNormWeights.of(layer.final_layer_norm),
                    product(layer.fc1),
                    product(layer.fc2),
                )
            )
        projections = [None if module is None else product(module) for module in (decoder.project_in, decoder.project_out)]
        return cls(
            decoder.embed_tokens.weight.detach(),
            decoder.embed_positions.weight.detach(),
            projections[0],
            tuple(layers),
            bool(config.do_layer_norm_before),
            None if decoder.final_layer_norm is None else LayerNormWeights.of(decoder.final_layer_norm),
            projections[1],
            _head(model),
            int(config.num_attention_heads),
            int(config.hidden_size),
        )

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def max_positions(self) -> int:
        return self.positions.shape[0] - 2

    @property
    def vocabulary(self) -> int:
        return self.tokens.shape[0]


def _head(model: Any) -> Product:
    wanted, weight = getattr(model.config, "head_values", None), model.lm_head.weight.detach()
    if wanted not in (None, "int8"):
        raise InputError(f"head_values is {wanted!r} in the model's config: it is int8 or None")
    return HeadProduct(weight) if wanted is None else Int8Product(weight)


def why_not(model: Any) -> str | None:
    """Why the engine cannot run ``model``, as a phrase that can follow "it", or None when it can."""
    config, decoder = model.config, model.model.decoder
    if model.training:
        return "is in training mode; call eval()"
    if config.activation_function != "relu":
        return f"has the activation {config.activation_function}, not relu"
    if not config.layer_norm_elementwise_affine:
        return "has LayerNorms without weights"
    if config.hidden_size // config.num_attention_heads % 8 or config.hidden_size % 8 or config.word_embed_proj_dim % 8:
        return f"has heads of {config.hidden_size // config.num_attention_heads}, which is no multiple of 8"
    parameters = list(model.parameters())
    if len({parameter.device for parameter in parameters}) > 1:
        return "lies on several devices"
    if len({parameter.dtype for parameter in parameters}) > 1:
        return "has parameters of several types"
    if type(model.lm_head) is not nn.Linear:
        return f"has a head of type {type(model.lm_head).__name__}"
    for index, layer in enumerate(decoder.layers):
        for name in _LINEARS:
            module = layer.get_submodule(name)
            if type(module) not in (SparseLinear, nn.Linear):
                return f"has a linear of type {type(module).__name__} (layer {index}, {name})"
            if module._forward_hooks or module._forward_pre_hooks:
                return f"has a hook on layer {index}, {name}"
    return None


def plans(model: Any) -> list[object]:
    """The kernel plans of the model's packed linears."""
    return [module._plan for module in model.modules() if isinstance(module, SparseLinear)]


def fingerprint(model: Any) -> tuple[object, ...]:
    """Changes whenever a weight of the model is moved, cast, replaced or given another kernel, while :func:`plans` are held."""
    # Taken before every generation: one pass over the modules, where parameters() and plans() would take several.
    modules = list(model.modules())
    parameters = [parameter for module in modules for parameter in module._parameters.values() if parameter is not None]
    places = (parameter.data_ptr() for parameter in parameters)
    made = (id(module._plan) for module in modules if isinstance(module, SparseLinear))
    return (parameters[0].dtype, parameters[0].device, getattr(model.config, "head_values", None), *places, *made)
