"""A single row's layers product by product: the kernels against float64 and against those that they stand for, steps, refusals."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_products import H200, TOLERANCE, make_packed, nvcc
from decoding import (
    assert_a_finished_row_stays,
    assert_steps_match_the_kernels_one_by_one,
    same_generation_with_and_without,
    small_opt,
)
from products import relative_error
from torch import Tensor
from torch.nn import functional as F

from sparse_engine import cuda, formats
from sparse_engine.backends.cuda_decode import RowParams, Streams, run_decode
from sparse_engine.backends.cuda_nm import to_fragments
from sparse_engine.backends.cuda_sources import Tile, fit
from sparse_engine.backends.cuda_tiles import MMA_UNSTRUCTURED, unstructured_parts
from sparse_engine.backends.cuda_unstructured import to_streams
from sparse_engine.engine.cuda import VARIABLE as STEP
from sparse_engine.engine.generation import VARIABLE
from sparse_engine.engine.kernels import layer_norm
from sparse_engine.engine.kernels.ahead import Ahead, ahead_of
from sparse_engine.engine.kernels.launching import gpu
from sparse_engine.engine.kernels.row_layers import RowLayers, Widths, nm_products, stream_products
from sparse_engine.engine.kernels.row_product import NmRowProduct, RowNorm, RowProduct
from sparse_engine.engine.kernels.row_stream import StreamRowProduct, fit_row
from sparse_engine.engine.rows import row_layers
from sparse_engine.engine.runner import Session, runner_for
from sparse_engine.engine.weights import DecoderWeights
from sparse_engine.errors import InputError
from sparse_engine.pattern import SparsityPattern

GROUPS = {"2:4": 4, "4:8": 8}
USUAL = Tile(1, 1, 1, 8, min_blocks=3)


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEP, "rows")


WIDTHS = (768, 2048, 2560, 4096, 5120, 7168)


def streams_of(columns: int, depth: int | None = None) -> Streams:
    """Of a weight that is nowhere, at half density where ``depth`` is not given."""
    parts = unstructured_parts(columns)
    return Streams(torch.empty(0, dtype=torch.int32), depth or 42 // parts, parts)


def products(hidden: int, group: int = 4) -> dict[str, RowProduct]:
    widths = Widths(hidden, 4 * hidden, 64, group)
    if group:
        return nm_products(widths, torch.bfloat16, H200)
    streams = {name: streams_of(4 * hidden if name == "fc2" else hidden) for name in ("qkv", "out", "fc1", "fc2")}
    return stream_products(widths, streams, torch.bfloat16, H200)


@pytest.mark.parametrize("group", [4, 8, 0])
@pytest.mark.parametrize("hidden", WIDTHS)
def test_the_kernels_compile_without_spills_and_their_blocks_fit(hidden: int, group: int, tmp_path: Path) -> None:
    for product in products(hidden, group).values():
        assert product.tile.min_blocks * (product.shared_bytes() + 1024) <= H200.shared_limit + 1024
        assert product.threads <= 1024
        log = nvcc("90a", product.file, product.macros(), tmp_path)
        assert max(int(count) for count in re.findall(r"(\d+) bytes spill stores", log)) == 0


@pytest.mark.parametrize("group", [4, 0])
def test_the_kernel_compiles_for_ampere(group: int, tmp_path: Path) -> None:
    product = products(768, group)["fc1"]
    nvcc("80", product.file, product.macros(), tmp_path)


def test_deep_units_leave_room_for_fewer_warps() -> None:
    usual = products(4096, 0)["fc2"]
    assert isinstance(usual, StreamRowProduct)
    deep = fit_row(replace(usual, streams=streams_of(usual.columns, 128)), H200)
    assert deep.tile.warps_k < usual.tile.warps_k
    assert deep.shared_bytes() <= H200.shared_limit
    with pytest.raises(InputError, match="units of 1000 words"):
        fit_row(replace(usual, streams=streams_of(usual.columns, 1000)), H200)


def test_clusters_share_few_long_row_tiles() -> None:
    for hidden in WIDTHS:
        clusters = {name: product.tile.cluster for name, product in products(hidden, 0).items()}
        assert clusters == {"qkv": 1, "out": 1, "fc1": 1, "fc2": 2 if hidden > 2048 else 1}


def test_products_of_long_rows_take_them_unit_by_unit() -> None:
    for hidden in WIDTHS:
        files = {name: product.file for name, product in products(hidden).items()}
        long = "decode_nm.cu" if hidden >= 4096 else "decode_row.cu"
        assert files == {"qkv": "decode_row.cu", "out": long, "fc1": "decode_row.cu", "fc2": long}


@pytest.mark.parametrize(
    ("source", "struct", "fields"), [("include/row_input.cuh", "RowParams", RowParams), ("include/ahead.cuh", "Ahead", Ahead)]
)
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
            NmRowProduct(768, columns, torch.bfloat16, USUAL, normed, 4)
        with pytest.raises(InputError, match="multiples of 256"):
            StreamRowProduct(768, columns, torch.bfloat16, USUAL, normed, streams_of(columns))
    with pytest.raises(InputError, match="unit by unit"):
        NmRowProduct(768, 768, torch.bfloat16, USUAL, True, 4, by_unit=True)
    with pytest.raises(InputError, match=r"256 / 2 columns"):
        StreamRowProduct(768, 768, torch.bfloat16, USUAL, True, streams_of(768))


def drawn(*shape: int, dtype: torch.dtype, seed: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, device="cuda", generator=generator) * spread).to(dtype)


class Operands:
    """What products of one weight are checked with: a row with a common offset, which a variance by plain sums of squares would lose."""

    eps = 1e-5

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.x = drawn(1, columns, dtype=dtype, seed=1) + 5
        self.norm = RowNorm(drawn(columns, dtype=dtype, seed=2), drawn(columns, dtype=dtype, seed=3), self.eps)
        self.bias, self.residual = drawn(rows, dtype=dtype, seed=4), drawn(1, rows, dtype=dtype, seed=5)
        self.normed = torch.empty_like(self.x)
        layer_norm(self.x, self.norm.scale, self.norm.shift, self.eps, self.normed)
        self.exact = F.layer_norm(self.x.double(), (columns,), self.norm.scale.double(), self.norm.shift.double(), self.eps)

    def epilogues(self) -> list[tuple[Tensor | None, bool, Tensor | None]]:
        """Bias, ReLU, residual."""
        return [(self.bias, False, None), (self.bias, True, None), (None, False, self.residual), (self.bias, True, self.residual)]

    def poisoned(self) -> Tensor:
        return torch.full_like(self.residual, float("nan"))


def assert_near(found: Tensor, row: Tensor, dense: Tensor, epilogue: tuple[Tensor | None, bool, Tensor | None]) -> None:
    """``found`` is the product of a float64 row and weight, plus bias, then ReLU, then + residual."""
    bias, relu, residual = epilogue
    expected = row @ dense.t() + (0 if bias is None else bias.double())
    expected = expected.relu() if relu else expected
    assert relative_error(found, expected + (0 if residual is None else residual.double())) < TOLERANCE[found.dtype]


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
    for rows in (3, 16, 40, 1001, 8200):
        packed = make_packed(pattern, (rows, columns), dtype, "cuda", seed=rows)
        weight = to_fragments(packed.tensors["values"], packed.tensors["bitmask"], packed.shape, GROUPS[pattern])
        dense = formats.for_pattern(SparsityPattern.parse(pattern)).unpack(packed).double()
        given = Operands(rows, columns, dtype)
        before, plain, staged = (
            NmRowProduct(rows, columns, dtype, tile, normed, GROUPS[pattern], by_unit)
            for normed, by_unit in ((True, False), (False, False), (False, True))
        )
        for epilogue in given.epilogues():
            added, relu, onto = epilogue
            options: dict[str, Any] = {"relu": relu, "residual": onto}
            found, twice, thrice, alone = (given.poisoned() for _ in range(4))
            before(given.x, weight, added, found, norm=given.norm, ahead=ahead_of(weight, 1 << 20), **options)
            plain(given.normed, weight, added, twice, **options)
            staged(given.normed, weight, added, thrice, **options)
            plain(given.x, weight, added, alone, **options)
            assert torch.equal(found, twice)
            assert torch.equal(found, thrice)
            assert_near(found, given.exact, dense, epilogue)
            assert_near(alone, given.x.double(), dense, epilogue)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", ["0.5", "0.7"])
@pytest.mark.parametrize(
    ("columns", "tile", "row_warps"),
    [
        (256, Tile(1, 1, 1, 3, 2, min_blocks=4, table_copies=4), 1),
        # Twelve tiles from one of a warp's to its next.
        (256, Tile(1, 1, 1, 12, 2, min_blocks=1, table_copies=4, cluster=2), 4),
        (768, Tile(1, 1, 1, 6, 2, stages=1, min_blocks=3, table_copies=4), 2),
        (768, Tile(1, 1, 1, 12, 2, min_blocks=1, table_copies=8), 4),
        (1024, Tile(1, 1, 1, 6, 2, stages=1, min_blocks=2, table_copies=4, cluster=2), 2),
        (1280, Tile(1, 1, 1, 8, 1, stages=3, min_blocks=1, table_copies=4), 4),
        (5120, Tile(1, 1, 1, 8, 1, min_blocks=1, table_copies=8), 4),
        (5120, Tile(1, 1, 1, 12, 1, min_blocks=1, table_copies=8, cluster=2), 4),
    ],
)
def test_unstructured_against_float64(
    columns: int, tile: Tile, row_warps: int, pattern: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = StreamRowProduct.blocks
    for rows in (3, 16, 40, 1001, 2112):
        packed = make_packed(pattern, (rows, columns), dtype, "cuda", seed=rows)
        weight, streams = to_streams(packed.tensors["values"], packed.tensors["bitmask"], packed.shape, tile.parts)
        dense = formats.for_pattern(SparsityPattern.parse(pattern)).unpack(packed).double()
        given = Operands(rows, columns, dtype)
        here = gpu(0)
        before, plain = (
            fit_row(StreamRowProduct(rows, columns, dtype, tile, normed, streams, row_warps), here) for normed in (True, False)
        )
        # Its warps add the same units, in the same order.
        other = fit(MMA_UNSTRUCTURED, replace(tile, warps_k=before.tile.warps_k, table_copies=4, cluster=1), 1, streams.depth, here)
        # Few blocks, which come round to the same places of sums again and again.
        for most in (3, 1 << 20):
            monkeypatch.setattr(StreamRowProduct, "blocks", lambda self, here, most=most: min(most, resident(self, here)))
            for epilogue in given.epilogues():
                added, relu, onto = epilogue
                options: dict[str, Any] = {"relu": relu, "residual": onto}
                found, twice, alone = (given.poisoned() for _ in range(3))
                before(given.x, weight, added, found, norm=given.norm, ahead=ahead_of(weight, 1 << 20), **options)
                plain(given.normed, weight, added, twice, **options)
                plain(given.x, weight, added, alone, **options)
                if before.tile.warps_k == plain.tile.warps_k:
                    assert torch.equal(found, twice)
                assert_near(found, given.exact, dense, epilogue)
                assert_near(alone, given.x.double(), dense, epilogue)
                if tile.cluster == 1 and other.warps_k == before.tile.warps_k:
                    expected = run_decode(
                        lambda *_, other=other: (MMA_UNSTRUCTURED, other), given.normed, weight, added, onto, rows, columns, relu, streams
                    )
                    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "0.5"])
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
def test_a_step_matches_the_kernels_one_by_one(pattern: str, dtype: torch.dtype, sizes: dict[str, Any]) -> None:
    model = small_opt(pattern, dtype=dtype, **sizes).to("cuda").eval()
    runner: Any = runner_for(model)
    assert isinstance(runner.layers, RowLayers)
    assert_steps_match_the_kernels_one_by_one(runner, list(runner.layers._rows.values()))


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_generation_is_the_same_with_and_without_them(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "engine")
    same_generation_with_and_without("layers", "a kernel per product", pattern)


@pytest.mark.gpu
def test_they_run_by_default_where_they_were_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STEP)
    sizes: dict[str, Any] = {"hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 2048, "num_attention_heads": 32}
    runner: Any = runner_for(small_opt("2:4", num_hidden_layers=1, **sizes).to("cuda").eval())
    assert isinstance(runner.layers, RowLayers)
    assert runner.path(1) == "a kernel per product"
    assert runner.path(2) == "cuda graphs"
    # Units of any depth leave room for some form of the kernel.
    for sparsity in ("0.3", "0.5", "0.9"):
        unstructured: Any = runner_for(small_opt(sparsity, num_hidden_layers=1, **sizes).to("cuda").eval())
        assert isinstance(unstructured.layers, RowLayers)
    for pattern, settings in (("1:4", sizes), ("2:4", {}), ("0.5", {}), ("0.5", sizes | {"dtype": torch.float32})):
        other: Any = runner_for(small_opt(pattern, num_hidden_layers=1, **settings).to("cuda").eval())
        assert other.layers is None


@pytest.mark.gpu
def test_by_default_kernels_run_where_units_leave_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 768, "num_attention_heads": 12}
    model = small_opt("0.5", num_hidden_layers=1, **sizes).to("cuda").eval()
    here = replace(gpu(0), shared_limit=8192)
    monkeypatch.setattr("sparse_engine.engine.kernels.row_layers.launching.gpu", lambda index: here)
    with pytest.raises(InputError, match=r"units of \d+ words"):
        runner_for(model)
    monkeypatch.delenv(STEP)
    runner: Any = runner_for(model)
    assert runner.layers is None


@pytest.mark.gpu
def test_a_finished_row_changes_nothing() -> None:
    assert_a_finished_row_stays(runner_for(small_opt("2:4").to("cuda").eval()), Session.step)


@pytest.mark.gpu
def test_models_that_cannot_have_them() -> None:
    for model, reason in (
        (small_opt("2:4", dtype=torch.float32), "computes in torch.float32"),
        (small_opt("1:4"), "neither all 2:4 nor all 4:8 nor all unstructured"),
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
    product = NmRowProduct(32, 256, torch.bfloat16, USUAL, False, 4)
    weight = torch.zeros(2 * 9 * 32 * 16, dtype=torch.uint8, device="cuda")
    x, y = (torch.zeros(1, n, dtype=torch.bfloat16, device="cuda") for n in (256, 32))
    with pytest.raises(InputError, match="x is"):
        product(y, weight, None, y)
    with pytest.raises(InputError, match="a weight of 4608 bytes"):
        product(x, weight[:4608], None, y)
    with pytest.raises(InputError, match="asks for nothing"):
        NmRowProduct(32, 256, torch.bfloat16, USUAL, False, 4, by_unit=True)(x, weight, None, y, ahead=ahead_of(weight, 64))
    with pytest.raises(InputError, match="begin at a multiple of 16"):
        product(torch.zeros(1, 257, dtype=torch.bfloat16, device="cuda")[:, 1:], weight, None, y)
    streams = Streams(torch.zeros(4, dtype=torch.int32, device="cuda"), 21, 2)
    stream = StreamRowProduct(32, 256, torch.bfloat16, replace(USUAL, parts=2, min_blocks=1), False, streams)
    with pytest.raises(InputError, match=r"offsets torch.int32 \(4,\)"):
        stream(x, weight.view(torch.bfloat16), None, y)
    with pytest.raises(InputError, match="words of torch"):
        stream(x, weight, None, y)
    with pytest.raises(InputError, match="takes no LayerNorm"):
        stream(x, weight, None, y, norm=RowNorm(x[0], x[0], 1e-5))
