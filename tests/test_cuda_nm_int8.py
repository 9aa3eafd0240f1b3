"""int8 2:4 weights on the GPU: the layout is an exact permutation (on any machine); levels, products and epilogues (on a GPU)."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from products import random_keep, relative_error
from test_cuda_kernels import H200, nvcc

from sparse_engine import cuda, formats, registry
from sparse_engine.backends import cuda_nm_int8
from sparse_engine.errors import InputError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern

PATTERN = SparsityPattern.parse("2:4")
SHAPES = [(16, 256), (33, 260), (1, 4), (200, 1028), (768, 768)]


def make_packed(shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> PackedWeight:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    weight[shape[0] // 2] = 0.0
    keep = random_keep(shape, PATTERN, generator)
    return formats.for_pattern(PATTERN).pack(weight.to(dtype), Mask(PATTERN, keep), value_type="int8").to(device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layout_gives_back_the_packed_weight(shape: tuple[int, int]) -> None:
    packed = make_packed(shape, torch.bfloat16)
    kernel = registry.get("cuda_nm_int8")
    layout = kernel.prepare(packed)
    assert sum(t.numel() * t.element_size() for t in layout.values()) == kernel.layout_nbytes(registry.Problem.of(packed, 1), packed)
    recovered = kernel.recover(layout, replace(packed, tensors={}))
    assert recovered.tensors.keys() == packed.tensors.keys()
    for name, tensor in packed.tensors.items():
        assert torch.equal(recovered.tensors[name], tensor), name


def test_fragments_hold_what_the_instruction_expects() -> None:
    """A product of the fragments alone, as the operands of wgmma m64nNk64 are defined (PTX ISA, sparse wgmma register fragments)."""
    packed = make_packed((32, 512), torch.bfloat16)
    fragments = cuda_nm_int8.to_fragments(packed.tensors["values"], packed.tensors["bitmask"], packed.shape).int()
    found = torch.zeros(packed.shape, dtype=torch.int8)
    for tile in range(2):
        for unit in range(2):
            for step in range(4):
                compressed, positions = torch.zeros(16, 32, dtype=torch.int8), torch.zeros(16, 16, dtype=torch.int32)
                for lane in range(32):
                    g, q = divmod(lane, 4)
                    for byte in range(16):
                        value = int(fragments[tile, unit, 1 + step, lane, byte])
                        compressed[g + 8 * (byte // 4 % 2), 16 * (byte // 8) + 4 * q + byte % 4] = value - 256 * (value > 127)
                    for byte in range(4):
                        word = int(fragments[tile, unit, 0, lane, 4 * step + byte])
                        positions[g + 8 * (q % 2), 8 * (q // 2) + 2 * byte] = word & 15
                        positions[g + 8 * (q % 2), 8 * (q // 2) + 2 * byte + 1] = word >> 4
                for row in range(16):
                    for group in range(16):
                        column = unit * 256 + step * 64 + group * 4
                        code = int(positions[row, group])
                        found[tile * 16 + row, column + (code & 3)] = compressed[row, 2 * group]
                        found[tile * 16 + row, column + (code >> 2)] = compressed[row, 2 * group + 1]
    assert torch.equal(found.float() * packed.tensors["scales"][:, None], formats.get("nm").unpack(replace(packed, dtype=torch.float32)))


def test_parameters_match_the_source() -> None:
    text = (cuda.source_folder() / "quantise_rows.cu").read_text()
    body = re.search(r"struct Params \{(.*?)\};", text, re.S)
    assert body is not None
    lines = [line.strip() for line in re.sub(r"//.*", "", body[1]).split(";")]
    declared = [name for line in lines for name in re.findall(r"[*\s](\w+)\s*(?:,|$)", line)]
    assert declared == [name for name, _ in cuda_nm_int8._QuantiseParams._fields_]
    assert ctypes.sizeof(cuda_nm_int8._QuantiseParams) == 48


@pytest.mark.parametrize("tile", cuda_nm_int8.TILES, ids=str)
def test_tiles_compile_within_their_registers(tile: cuda_nm_int8.PrefillTile, tmp_path: Path) -> None:
    assert cuda_nm_int8.SOURCE.fits(tile, H200)
    said = nvcc("90a", cuda_nm_int8.SOURCE.file, dict(cuda_nm_int8.SOURCE.all_macros(tile, torch.bfloat16)), tmp_path)
    spills = re.search(r"(\d+) bytes spill stores", said)
    assert spills is not None
    # Outside of the products.
    assert int(spills[1]) <= 64
    assert "serialized" not in said


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [256, 260, 1030, 9216])
def test_levels_of_rows(columns: int, dtype: torch.dtype) -> None:
    wide = torch.randn(37, columns + 3, device="cuda", dtype=dtype)
    wide[5] = 0.0
    for x in (wide[:, :columns].contiguous(), wide[:, 1 : columns + 1]):
        levels, scales = cuda_nm_int8.quantise_rows(x)
        expected = x.float().abs().amax(1) / 127
        torch.testing.assert_close(scales[:37], expected)
        assert relative_error(levels.float() * scales[:37, None], x.double()) < 1e-2
        assert int(levels[5].abs().max()) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (520, 2048)], ids=str)
def test_product_is_that_of_the_levels(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = make_packed(shape, dtype, "cuda")
    kernel = registry.get("cuda_nm_int8")
    layout = kernel.prepare(packed)
    weight = formats.get("nm").unpack(replace(packed, dtype=torch.float32)).double()
    for m in (1, 3, 17, 129, 300, 1100):
        x = torch.randn(m, shape[1], device="cuda", dtype=dtype)
        bias = torch.randn(shape[0], device="cuda", dtype=dtype) if m % 2 else None
        residual = torch.randn(m, shape[0], device="cuda", dtype=dtype) if m % 3 else None
        levels, scales = cuda_nm_int8.quantise_rows(x)
        expected = (levels.double() * scales[:m, None].double()) @ weight.T
        if bias is not None:
            expected += bias.double()
        expected = expected.clamp_min(0)
        if residual is not None:
            expected += residual.double()
        for config in [(), *kernel.configs(registry.Problem.of(packed, m))]:
            torch.full((m, shape[0]), float("nan"), device="cuda", dtype=dtype)
            if config:
                y = kernel.run_config(x, layout, bias, PATTERN, config).clamp_min(0)
                y = y if residual is None else y + residual
            else:
                y = kernel.run_fused(x, layout, bias, PATTERN, relu=True, residual=residual)
            assert relative_error(y, expected) < (1e-2 if dtype is torch.bfloat16 else 2e-3), (m, config)


@pytest.mark.gpu
def test_wrong_arguments_are_refused_and_the_operator_is_sound() -> None:
    packed = make_packed((64, 256), torch.bfloat16, "cuda")
    kernel = registry.get("cuda_nm_int8")
    layout = kernel.prepare(packed)
    with pytest.raises(InputError, match="take bfloat16 or float16"):
        kernel.run(torch.zeros(1, 256, device="cuda"), layout, None, PATTERN)
    with pytest.raises(InputError, match="x has 128 columns"):
        kernel.run(torch.zeros(1, 128, device="cuda", dtype=torch.bfloat16), layout, None, PATTERN)
    x = torch.randn(3, 256, device="cuda", dtype=torch.bfloat16)
    arguments = (x, layout["weight"], layout["scales"], None, None, 64, 256, False)
    torch.library.opcheck(torch.ops.sparse_engine.cuda_nm_int8_linear.default, arguments)
