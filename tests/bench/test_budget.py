"""Where a step's time goes: parts told by the kernels' order, and a single kernel's by its clocks."""

from __future__ import annotations

import pytest
import torch

from sparse_engine.bench.budget import WHOLE, Span, budget, roles, split_by_clocks


def test_a_budget_charges_each_part_with_what_it_puts_off_the_end() -> None:
    layer = ["layer_norm", "decode_nm", "attention_decode", "decode_nm", "layer_norm", "decode_nm", "decode_nm"]
    names = ["embed", *layer, *layer, "layer_norm", "nvjet_head", "greedy"]
    # Every kernel starts 3 µs before its predecessor ends and ends 2 µs behind it; the head takes 9.
    spans, at = [Span("greedy", -2.0, 0.0)], 0.0
    for name in names:
        took = 9.0 if name == "nvjet_head" else 2.0
        spans.append(Span(name, at - 3, at + took))
        at += took
    parts = {row["part"]: row for row in budget(spans)}
    counts = {part: row["kernels"] for part, row in parts.items()}
    assert counts == {
        "embedding": 1,
        "LayerNorm": 5,
        "qkv product": 2,
        "attention": 2,
        "out product": 2,
        "fc1 and fc2 products": 4,
        "head": 1,
        "choice of the token": 1,
    }
    assert parts["head"]["us"] == 9.0
    assert parts["fc1 and fc2 products"]["us"] == 8.0
    assert sum(row["us"] for row in parts.values()) == pytest.approx(at)
    assert sum(row["share"] for row in parts.values()) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="two are needed"):
        budget(spans[1:])


def test_products_with_their_layer_norms_are_told_apart() -> None:
    product = "decode_row_stream"
    layer = [product, "attention_decode", product, product, product]
    of_layer = ["LayerNorm and qkv product", "attention", "out product", "LayerNorm and fc1 product", "fc2 product"]
    found = roles(["embed", *layer, *layer, "layer_norm", "nvjet_head", "greedy"])
    assert found == ["embedding", *of_layer, *of_layer, "LayerNorm", "head", "choice of the token"]
    # The same kernel without them.
    layer = ["layer_norm", product, "attention_decode", product, "layer_norm", product, product]
    of_layer = ["LayerNorm", "qkv product", "attention", "out product", "LayerNorm", *["fc1 and fc2 products"] * 2]
    found = roles(["embed", *layer, *layer, "layer_norm", "nvjet_head", "greedy"])
    assert found == ["embedding", *of_layer, *of_layer, "LayerNorm", "head", "choice of the token"]


def test_the_step_in_one_kernel_is_split_by_its_clocks() -> None:
    layers, blocks = 2, 3
    clocks = torch.zeros(4, blocks, 5 * layers + 2, 2, dtype=torch.int64)
    for block, offset in enumerate((1000, 77000, 5)):
        for phase in range(5 * layers + 1):
            # Attention takes 30, all else 10; the first phase has what it needs after 40.
            clocks[:, block, phase, 0] = offset + 40 + 10 * phase + 20 * ((phase + 3) // 5)
        clocks[:, block, -1, 0] = offset
        clocks[:, block, -1, 1] = offset + 40 + 10 * 11 + 40
    clocks[:, 1, 2] = 0  # a block without a tile in a phase
    rows = [{"part": WHOLE, "kernels": 1, "us": 95.0, "share": 0.95}, {"part": "other", "kernels": 1, "us": 5.0, "share": 0.05}]
    parts = {row["part"]: row["us"] for row in split_by_clocks(rows, clocks)}
    assert parts == {
        "attention": 30.0,
        "embedding and first copies": 20.0,
        "qkv product": 10.0,
        "out product": 10.0,
        "fc1 product": 10.0,
        "fc2 product": 10.0,
        "head and choice of the token": 5.0,
        "other": 5.0,
    }
