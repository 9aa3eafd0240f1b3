"""LoRA under a mask: y = W₀x + s·(M ⊙ BA)x, so that W₀ + s·(M ⊙ BA) has the zeros of W₀ and merging changes no output.

peft's own layers compute B(Ax), which has no place for an element-wise mask, and their targets do not include packed linears.
This layer joins peft through the custom-module hook of its LoraConfig, so that configs, saving, loading and the trainer's handling
of adapters stay peft's. It is used over a dense, a quantised or (for inference) a packed base alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sparse_engine.mask import Mask

__all__ = ["MASK_BUFFER", "MaskedLora", "attach_masks", "register_masked"]

MASK_BUFFER = "sparsity_mask"
"""Buffer of a base layer that holds its bool (out, in) mask while adapters are on it; never saved."""


class MaskedLora(nn.Module, LoraLayer):
    """A linear layer whose low-rank update is confined to the kept weights of its base.

    Args:
        base_layer: any module with in_features and out_features and a :data:`MASK_BUFFER`.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int = 0, lora_alpha: int = 1, **kwargs: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s·(M ⊙ BA), (out_features, in_features)."""
        low, high = self.lora_A[adapter], self.lora_B[adapter]
        assert isinstance(low.weight, Tensor)
        assert isinstance(high.weight, Tensor)
        product = high.weight @ low.weight
        mask: Tensor = getattr(self.get_base_layer(), MASK_BUFFER)
        scaled: Tensor = product * self.scaling[adapter] * mask.to(product.device)
        return scaled

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                delta = self.get_delta_weight(adapter)
                inputs = self.lora_dropout[adapter](self._cast_input_dtype(x, delta.dtype))
                result = result + F.linear(inputs, delta).to(result.dtype)
        return result


def attach_masks(model: nn.Module, masks: Mapping[str, Mask]) -> None:
    """Give each masked linear of ``model`` its mask as a non-persistent buffer on the layer's device."""
    for name, mask in masks.items():
        module = model.get_submodule(name)
        device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        module.register_buffer(MASK_BUFFER, mask.keep.to(device), persistent=False)


def register_masked(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """Make ``config`` use :class:`MaskedLora` for every kind of layer of ``model`` that carries a mask.

    peft does not save this choice: it is made anew whenever an adapter is loaded.
    """
    kinds = {type(module) for module in model.modules() if MASK_BUFFER in dict(module.named_buffers(recurse=False))}
    config._register_custom_module(dict.fromkeys(kinds, MaskedLora))
    return config
