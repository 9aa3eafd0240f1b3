"""Prompts through quantised weights: LayerNorms leave the levels that the products behind them multiply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from products import relative_error
from torch import Tensor

from sparse_engine import SparseLinear, SparseOPTForCausalLM
from sparse_engine.engine.product import PackedProduct, feed_forward
from sparse_engine.engine.runner import runner_for
from sparse_engine.engine.weights import LayerNormWeights
from sparse_engine.levels import TokenLevels, levels_of_rows, relu_bound


class Recorded:
    """Stands for a packed layer that multiplies by one, levels of int8 or rows."""

    def __init__(self, element: torch.dtype | None) -> None:
        self.element, self.seen = element, [""]

    def plan(self) -> None: ...

    def fused(self, x: Tensor, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        self.seen.append("residual" if residual is not None else f"rows {relu}")
        y = x.relu() if relu else x
        return y if residual is None else y + residual

    def levels_at(self, rows: int) -> torch.dtype | None:
        return self.element if rows > 1 else None

    def of_levels(self, tokens: TokenLevels, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        self.seen.append(f"levels {relu}")
        y = tokens.values.float() * tokens.scales[: len(tokens), None]
        y = y.relu() if relu else y
        return y if residual is None else y + residual

    def relu_bound(self, rows: int) -> Tensor | None:
        return relu_bound(torch.ones(1), None) if self.element is torch.float8_e4m3fn and rows > 1 else None

    def relu_levels(self, tokens: TokenLevels) -> TokenLevels:
        self.seen.append("levels to levels")
        assert tokens.ahead is not None
        x = tokens.values.float() * tokens.scales[: len(tokens), None]
        return TokenLevels((x * tokens.ahead[1, : len(tokens), None]).relu().to(self.element), tokens.ahead[0], tokens.dtype)


@pytest.mark.parametrize(
    ("element", "rows", "expected"), [(torch.int8, 5, "levels True"), (torch.int8, 1, "rows True"), (None, 5, "rows True")]
)
def test_a_norm_leaves_what_the_product_multiplies(element: torch.dtype | None, rows: int, expected: str) -> None:
    torch.manual_seed(0)
    h = torch.randn(rows, 64).bfloat16()
    norm = LayerNormWeights(torch.randn(64).bfloat16(), torch.randn(64).bfloat16(), 1e-5)
    layer: Any = Recorded(element)
    found = PackedProduct(layer).of_norm(norm, h, relu=True)
    assert layer.seen[-1] == expected
    normed = F.layer_norm(h.float(), (64,), norm.weight.float(), norm.bias.float(), norm.eps).bfloat16()
    tokens = levels_of_rows(normed, torch.int8)
    of_levels = tokens.values.float() * tokens.scales[:rows, None]
    assert relative_error(found, (of_levels if expected.startswith("levels") else normed).double().relu()) < 1e-2


@pytest.mark.parametrize(
    ("elements", "rows", "first", "second"),
    [
        ((torch.float8_e4m3fn, torch.float8_e4m3fn), 5, "levels to levels", "levels False"),
        ((torch.int8, torch.int8), 5, "levels True", "residual"),
        ((torch.float8_e4m3fn, None), 5, "levels True", "residual"),
        ((torch.float8_e4m3fn, torch.float8_e4m3fn), 1, "rows True", "residual"),
    ],
)
def test_levels_stay_between_the_two_products(elements: Any, rows: int, first: str, second: str) -> None:
    torch.manual_seed(0)
    h = torch.randn(rows, 64).bfloat16()
    norm = LayerNormWeights(torch.randn(64).bfloat16(), torch.randn(64).bfloat16(), 1e-5)
    layers: list[Any] = [Recorded(element) for element in elements]
    found, pending = feed_forward(PackedProduct(layers[0]), PackedProduct(layers[1]), norm, h)
    assert pending is None
    assert (layers[0].seen[-1], layers[1].seen[-1]) == (first, second)
    normed = F.layer_norm(h.double(), (64,), norm.weight.double(), norm.bias.double(), norm.eps)
    # Nothing clips: the products' weights are of norm 1.
    assert relative_error(found, normed.relu() + h.double()) < 5e-2


@pytest.mark.gpu
@pytest.mark.parametrize("values", ["int8", "fp8"])
def test_prompts_of_a_quantised_model(values: str, tiny_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model: Any = SparseOPTForCausalLM.from_pretrained(tiny_opt, nm="2:4", values=values, dtype=torch.bfloat16).to("cuda").eval()
    prompts = [torch.randint(4, 200, (length,), device="cuda") for length in (40, 7)]
    calls: list[int] = []
    original, to_levels = SparseLinear.of_levels, SparseLinear.relu_levels

    def counted(self: SparseLinear, tokens: TokenLevels, **arguments: Any) -> Tensor:
        calls.append(len(tokens))
        return original(self, tokens, **arguments)

    def counted_to_levels(self: SparseLinear, tokens: TokenLevels) -> TokenLevels:
        calls.append(len(tokens))
        return to_levels(self, tokens)

    monkeypatch.setattr(SparseLinear, "of_levels", counted)
    monkeypatch.setattr(SparseLinear, "relu_levels", counted_to_levels)

    def logits() -> tuple[Tensor, Tensor]:
        runner = runner_for(model)
        assert not isinstance(runner, str)
        cache = runner.allocate(2, 64, 1)
        behind = runner.prefill(cache, [0, 1], prompts)
        cache.state.lengths[:2] = torch.tensor([40, 7], device="cuda")
        cache.state.tokens[:2] = torch.tensor([11, 12], device="cuda")
        return behind, runner.logits(cache)[:2]

    with torch.no_grad():
        found = logits()
        fc1 = model.model.decoder.layers[0].fc1
        assert (fc1.relu_bound(47) is not None, fc1.relu_bound(2) is not None) == ((values == "fp8"),) * 2
        products = (3 if values == "fp8" else 2) * model.config.num_hidden_layers
        assert calls == [47] * products + [2] * products, "qkv, fc1 and, of fp8, fc2 of each layer, of the prompts and of a step"
        monkeypatch.setattr(SparseLinear, "levels_at", lambda self, rows: None)
        expected = logits()
    assert len(calls) == 2 * products
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other.double()) < (2e-2 if values == "int8" else 4e-2)
