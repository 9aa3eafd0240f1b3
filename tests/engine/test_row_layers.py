"""A single row's layers product by product: the kernel against float64 and against the two that it stands for, steps, refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_products import H200, TOLERANCE, make_packed, nvcc
from decoding import assert_steps_match_the_kernels_one_by_one, finished_session, same_generation_with_and_without, small_opt
from products import relative_error
from torch import Tensor
from torch.nn import functional as F

from sparse_engine import cuda, formats
from sparse_engine.backends.cuda_nm import to_fragments
from sparse_engine.backends.cuda_sources import Tile
from sparse_engine.engine.cuda import VARIABLE as STEP
from sparse_engine.engine.generation import VARIABLE
from sparse_engine.engine.kernels import layer_norm
from sparse_engine.engine.kernels.ahead import Ahead, ahead_of
from sparse_engine.engine.kernels.row_layers import RowLayers, Widths, row_products
from sparse_engine.engine.kernels.row_product import RowNorm, RowProduct
from sparse_engine.engine.kernels.row_product import _Params as RowParams
from sparse_engine.engine.rows import row_layers
from sparse_engine.engine.runner import runner_for
from sparse_engine.engine.weights import DecoderWeights
from sparse_engine.errors import InputError
from sparse_engine.pattern import SparsityPattern

GROUPS = {"2:4": 4, "4:8": 8}
USUAL = Tile(1, 1, 1, 8, min_blocks=3)


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEP, "rows")


WIDTHS = (768, 2048, 2560, 4096, 5120, 7168)


def products(hidden: int, group: int = 4) -> dict[str, RowProduct]:
    return row_products(Widths(hidden, 4 * hidden, 64, group), torch.bfloat16, H200)


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("hidden", WIDTHS)
def test_the_kernels_compile_without_spills_and_their_blocks_fit(hidden: int, group: int, tmp_path: Path) -> None:
    for product in products(hidden, group).values():
        assert product.tile.min_blocks * (product.shared_bytes() + 1024) <= H200.shared_limit + 1024
        log = nvcc("90a", product.file, product.macros(), tmp_path)
        assert max(int(count) for count in re.findall(r"(\d+) bytes spill stores", log)) == 0


def test_the_kernel_compiles_for_ampere(tmp_path: Path) -> None:
    nvcc("80", "decode_row.cu", products(768)["fc1"].macros(), tmp_path)


def test_products_of_long_rows_take_them_unit_by_unit() -> None:
    for hidden in WIDTHS:
        files = {name: product.file for name, product in products(hidden).items()}
        long = "decode_nm.cu" if hidden >= 4096 else "decode_row.cu"
        assert files == {"qkv": "decode_row.cu", "out": long, "fc1": "decode_row.cu", "fc2": long}


@pytest.mark.parametrize(("source", "struct", "fields"), [("decode_row.cu", "RowParams", RowParams), ("include/ahead.cuh", "Ahead", Ahead)])
def test_parameters_match_the_source(source: str, struct: str, fields: Any) -> None:
    body = re.search(rf"struct {struct} \{{(.*?)\}};", (cuda.source_folder() / source).read_text(), re.S)
    assert body is not None
    plain = re.sub(r"//.*", "", body[1])
    declared = [name for line in plain.split(";") for name in re.findall(r"[*\s](\w+)\s*(?:,|$)", line.strip())]
    assert declared == [name for name, *_ in fields._fields_]


def test_what_is_asked_for_lies_inside_its_tensor() -> None:
    weight = torch.zeros(1000, dtype=torch.bfloat16)
    assert [ahead_of(weight, most).bytes for most in (0, 15, 100, 1 << 30)] == [0, 0, 96, 2000]


def test_forms_that_it_does_not_have() -> None:
    for columns, normed in ((320, False), (9216, True)):
        with pytest.raises(InputError, match="multiples of 256"):
            RowProduct(768, columns, 4, torch.bfloat16, USUAL, normed)
    with pytest.raises(InputError, match="unit by unit"):
        RowProduct(768, 768, 4, torch.bfloat16, USUAL, normed=True, by_unit=True)


def drawn(*shape: int, dtype: torch.dtype, seed: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, device="cuda", generator=generator) * spread).to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize(
    ("columns", "tile"),
    [
        (256, Tile(1, 1, 1, 3, min_blocks=4)),
        (768, Tile(1, 1, 1, 12, 4, min_blocks=2)),
        (2048, Tile(1, 1, 1, 8, 1, min_blocks=3)),
        (2560, Tile(1, 1, 1, 8, 2, min_blocks=3)),
        (5120, Tile(1, 1, 1, 4, 1, min_blocks=4)),
    ],
)
def test_against_float64(columns: int, tile: Tile, pattern: str, dtype: torch.dtype) -> None:
    eps = 1e-5
    for rows in (3, 16, 40, 1001, 8200):
        packed = make_packed(pattern, (rows, columns), dtype, "cuda", seed=rows)
        weight = to_fragments(packed.tensors["values"], packed.tensors["bitmask"], packed.shape, GROUPS[pattern])
        dense = formats.for_pattern(SparsityPattern.parse(pattern)).unpack(packed).double()
        # A common offset, which a variance by plain sums of squares would lose.
        x = drawn(1, columns, dtype=dtype, seed=1) + 5
        norm = RowNorm(drawn(columns, dtype=dtype, seed=2), drawn(columns, dtype=dtype, seed=3), eps)
        bias, residual = drawn(rows, dtype=dtype, seed=4), drawn(1, rows, dtype=dtype, seed=5)
        normed = torch.empty_like(x)
        layer_norm(x, norm.scale, norm.shift, eps, normed)
        exact = F.layer_norm(x.double(), (columns,), norm.scale.double(), norm.shift.double(), eps)
        before, plain, staged = (
            RowProduct(rows, columns, GROUPS[pattern], dtype, tile, *form) for form in ((True, False), (False, False), (False, True))
        )
        for relu, added, onto in ((False, bias, None), (True, bias, None), (False, None, residual), (True, bias, residual)):
            options: dict[str, Any] = {"relu": relu, "residual": onto}
            found, twice, thrice, alone = (torch.full((1, rows), float("nan"), dtype=dtype, device="cuda") for _ in range(4))
            before(x, weight, added, found, norm=norm, ahead=ahead_of(weight, 1 << 20), **options)
            plain(normed, weight, added, twice, **options)
            staged(normed, weight, added, thrice, **options)
            plain(x, weight, added, alone, **options)
            assert torch.equal(found, twice)
            assert torch.equal(found, thrice)
            for y, row in ((found, exact), (alone, x.double())):
                expected = row @ dense.t() + (0 if added is None else added.double())
                expected = expected.relu() if relu else expected
                assert relative_error(y, expected + (0 if onto is None else onto.double())) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("nm", ["2:4", "4:8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072, "num_attention_heads": 12},
        {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240, "num_attention_heads": 32, "num_hidden_layers": 2},
        # Rows unit by unit, and what the next product reads asked for.
        {"hidden_size": 5120, "word_embed_proj_dim": 5120, "ffn_dim": 5632, "num_attention_heads": 40, "num_hidden_layers": 1},
    ],
    ids=["256", "768", "2560", "5120"],
)
def test_a_step_matches_the_kernels_one_by_one(nm: str, dtype: torch.dtype, sizes: dict[str, Any]) -> None:
    model = small_opt(nm, dtype=dtype, **sizes).to("cuda").eval()
    runner: Any = runner_for(model)
    assert isinstance(runner.layers, RowLayers)
    assert_steps_match_the_kernels_one_by_one(runner, list(runner.layers._rows.values()))


@pytest.mark.gpu
def test_generation_is_the_same_with_and_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "engine")
    same_generation_with_and_without("layers", "a kernel per product")


@pytest.mark.gpu
def test_they_run_by_default_where_they_were_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STEP)
    sizes: dict[str, Any] = {"hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 2048, "num_attention_heads": 32}
    runner: Any = runner_for(small_opt("2:4", num_hidden_layers=1, **sizes).to("cuda").eval())
    assert isinstance(runner.layers, RowLayers)
    assert runner.path(1) == "a kernel per product"
    assert runner.path(2) == "cuda graphs"
    for nm, settings in (("4:8", sizes), ("2:4", {}), ("2:4", sizes | {"dtype": torch.float32})):
        other: Any = runner_for(small_opt(nm, num_hidden_layers=1, **settings).to("cuda").eval())
        assert other.layers is None


@pytest.mark.gpu
def test_a_finished_row_changes_nothing() -> None:
    runner: Any = runner_for(small_opt("2:4").to("cuda").eval())
    session, before = finished_session(runner)
    cache = session.cache
    session.step()
    assert torch.equal(cache.k, before.k)
    assert torch.equal(cache.v, before.v)
    assert int(cache.state.lengths[0]) == cache.capacity


@pytest.mark.gpu
def test_models_that_cannot_have_them() -> None:
    for model, reason in (
        (small_opt("2:4", dtype=torch.float32), "computes in torch.float32"),
        (small_opt("1:4"), "neither all 2:4 nor all 4:8"),
        (small_opt("2:4", hidden_size=320, word_embed_proj_dim=320, num_attention_heads=5), "a row of 320 columns"),
    ):
        model = model.to("cuda").eval()
        found = row_layers(DecoderWeights.of(model))
        assert isinstance(found, str)
        assert re.search(reason, found)
        with pytest.raises(InputError, match="asks for a kernel per product"):
            runner_for(model)


@pytest.mark.gpu
def test_wrong_arguments_are_refused() -> None:
    product = RowProduct(32, 256, 4, torch.bfloat16, USUAL)
    weight = torch.zeros(2 * 9 * 32 * 16, dtype=torch.uint8, device="cuda")
    x, y = (torch.zeros(1, n, dtype=torch.bfloat16, device="cuda") for n in (256, 32))
    with pytest.raises(InputError, match="x is"):
        product(y, weight, None, y)
    with pytest.raises(InputError, match="a weight of 4608 bytes"):
        product(x, weight[:4608], None, y)
    with pytest.raises(InputError, match="asks for nothing"):
        RowProduct(32, 256, 4, torch.bfloat16, USUAL, by_unit=True)(x, weight, None, y, ahead=ahead_of(weight, 64))
    with pytest.raises(InputError, match="begin at a multiple of 16"):
        product(torch.zeros(1, 257, dtype=torch.bfloat16, device="cuda")[:, 1:], weight, None, y)
