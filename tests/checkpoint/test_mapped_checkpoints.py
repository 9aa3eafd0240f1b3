"""Packed weights of a checkpoint are used where they lie in the mapped file: loading copies none of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sparse_engine.convert import convert
from sparse_engine.hf import SparseOPTForCausalLM
from sparse_engine.linear import SparseLinear
from sparse_engine.pattern import SparsityPattern


def mapped_ranges(folder: Path) -> list[tuple[int, int]]:
    """Address ranges of this process that are files of ``folder``."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [fields[0].split("-") for fields in lines if len(fields) > 5 and fields[5].startswith(str(folder))]
    return [(int(begin, 16), int(end, 16)) for begin, end in spans]


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc/self/maps")
@pytest.mark.parametrize("settings", [{}, {"values": "int8"}, {"values": "fp8"}, {"values": "int4"}], ids=str)
def test_packed_tensors_are_not_copied_at_load(tiny_opt: Path, tmp_path: Path, settings: dict[str, str]) -> None:
    convert(tiny_opt, tmp_path / "packed", pattern=SparsityPattern.nm(2, 4), **settings)
    model = SparseOPTForCausalLM.from_pretrained(tmp_path / "packed").eval()
    with torch.inference_mode():
        model(torch.arange(5)[None])
    ranges = mapped_ranges(tmp_path / "packed")
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert layers
    for layer in layers:
        for name, tensor in layer.packed.tensors.items():
            assert any(begin <= tensor.data_ptr() < end for begin, end in ranges), f"{name} is a copy"
