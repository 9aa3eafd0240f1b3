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
from sparse_engine.backends import cuda_row_stream
from sparse_engine.backends.cuda_decode import RowParams, Streams, run_decode
from sparse_engine.backends.cuda_nm import to_fragments
from sparse_engine.backends.cuda_row_stream import row_of
from sparse_engine.backends.cuda_sources import Source, Tile, fit
from sparse_engine.backends.cuda_tiles import MMA_24, MMA_48, MMA_UNSTRUCTURED, unstructured_parts
from sparse_engine.backends.cuda_unstructured import to_streams
from sparse_engine.engine.cuda import VARIABLE as STEP
from sparse_engine.engine.generation import VARIABLE
from sparse_engine.engine.kernels import layer_norm
from sparse_engine.engine.kernels.ahead import Ahead, ahead_of
from sparse_engine.engine.kernels.launching import gpu
from sparse_engine.engine.kernels.row_layers import RowLayers, Widths, row_products
from sparse_engine.engine.kernels.row_product import RowNorm, RowProduct, fit_row
from sparse_engine.engine.rows import row_layers
from sparse_engine.engine.runner import Session, runner_for
from sparse_engine.engine.weights import DecoderWeights
from sparse_engine.errors import InputError
from sparse_engine.pattern import SparsityPattern

GROUPS = {"2:4": 4, "4:8": 8}
MMA = {"2:4": MMA_24, "4:8": MMA_48}


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEP, "rows")


WIDTHS = (768, 2048, 2560, 4096, 5120, 7168)


def streams_of(columns: int, depth: int | None = None) -> Streams:
    """Of a weight that is nowhere, at half density where ``depth`` is not given."""
    parts = unstructured_parts(columns)
    return Streams(torch.empty(0, dtype=torch.int32), depth or 42 // parts, parts)


def products(hidden: int, group: int = 4) -> dict[str, RowProduct]:
    streams = {} if group else {name: streams_of(4 * hidden if name == "fc2" else hidden) for name in ("qkv", "out", "fc1", "fc2")}
    return row_products(Widths(hidden, 4 * hidden, 64, group), streams, torch.bfloat16, H200)


@pytest.mark.parametrize("group", [4, 8, 0])
@pytest.mark.parametrize("hidden", WIDTHS)
def test_the_kernels_compile_without_spills_and_their_blocks_fit(hidden: int, group: int, tmp_path: Path) -> None:
    for product in row_products_once(hidden, group):
        assert product.form.tile.min_blocks * (product.shared_bytes() + 1024) <= H200.shared_limit + 1024
        assert product.form.threads <= 1024
        log = nvcc("90a", cuda_row_stream.SOURCE, product.form.macros(torch.bfloat16), tmp_path)
        assert max(int(count) for count in re.findall(r"(\d+) bytes spill stores", log)) == 0


def row_products_once(hidden: int, group: int) -> list[RowProduct]:
    """Each form once."""
    return list({product.form: product for product in products(hidden, group).values()}.values())


def test_deep_units_leave_room_for_fewer_warps() -> None:
    usual = products(4096, 0)["fc2"]
    deep = fit_row(replace(usual, streams=streams_of(usual.form.columns, 128)), H200)
    assert deep.form.tile.warps_k < usual.form.tile.warps_k
    assert deep.shared_bytes() <= H200.shared_limit
    with pytest.raises(InputError, match="units of 1000 words"):
        fit_row(replace(usual, streams=streams_of(usual.form.columns, 1000)), H200)


def test_clusters_share_few_long_row_tiles() -> None:
    for hidden in WIDTHS:
        for group in (4, 8, 0):
            clusters = {name: product.form.tile.cluster for name, product in products(hidden, group).items()}
            shared = hidden > 2048 if group == 0 else hidden >= 5120
            assert clusters == {"qkv": 1, "out": 1, "fc1": 1, "fc2": 2 if shared else 1}


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
    for pattern in ("2:4", "unstructured"):
        for columns, normed in ((320, False), (9216, True)):
            form = replace(row_of(pattern, columns, 8, 2, 4, 1, 4, 1), normed=normed)
            with pytest.raises(InputError, match="multiples of 256"):
                RowProduct(768, torch.bfloat16, form, streams_of(columns) if pattern == "unstructured" else None)
    form = row_of("unstructured", 2048, 8, 2, 4, 1, 4, 1)
    with pytest.raises(InputError, match=r"256 / 2 columns"):
        RowProduct(768, torch.bfloat16, form, streams_of(768))
    with pytest.raises(InputError, match="without places"):
        RowProduct(768, torch.bfloat16, form)
    with pytest.raises(InputError, match="2:4 with places"):
        RowProduct(768, torch.bfloat16, row_of("2:4", 2048, 8, 2, 1, 1, 4, 1), streams_of(2048))


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


FORMS = [
    # Columns, then the fields of a configuration; the third is the parts of a unit, or copies of the table.
    (256, (3, 2, 1, 4, 1, 1)),
    # Twelve tiles from one of a warp's to its next.
    (256, (12, 2, 2, 1, 4, 2)),
    (768, (6, 1, 2, 3, 2, 1)),
    (768, (12, 1, 4, 2, 4, 1)),
    (768, (12, 2, 4, 1, 4, 1)),
    (1024, (6, 1, 4, 2, 2, 2)),
    (1280, (8, 3, 1, 1, 4, 1)),
    (5120, (8, 2, 1, 1, 4, 1)),
    (5120, (12, 2, 1, 1, 4, 2)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "0.5", "0.7"])
@pytest.mark.parametrize(("columns", "fields"), FORMS, ids=str)
def test_against_float64(columns: int, fields: tuple[int, ...], pattern: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And bit by bit against the kernels whose results these are."""
    resident, here = RowProduct.blocks, gpu(0)
    for rows in (3, 16, 40, 1001, 2112):
        packed = make_packed(pattern, (rows, columns), dtype, "cuda", seed=rows)
        values, bitmask, streams = packed.tensors["values"], packed.tensors["bitmask"], None
        if pattern in GROUPS:
            weight = to_fragments(values, bitmask, packed.shape, GROUPS[pattern]).view(dtype)
            form = row_of(pattern, columns, *fields)  # type: ignore[arg-type]
        else:
            weight, streams = to_streams(values, bitmask, packed.shape, unstructured_parts(columns))
            warps, slots, _, *others = fields
            form = row_of("unstructured", columns, warps, slots, 4, *others)  # type: ignore[arg-type]
        dense = formats.for_pattern(SparsityPattern.parse(pattern)).unpack(packed).double()
        given = Operands(rows, columns, dtype)
        before, plain = (fit_row(RowProduct(rows, dtype, replace(form, normed=normed), streams), here) for normed in (True, False))
        # Few blocks, which come round to the same places of sums again and again.
        for most in (3, 1 << 20):
            monkeypatch.setattr(RowProduct, "blocks", lambda self, here, most=most: min(most, resident(self, here)))
            for epilogue in given.epilogues():
                added, relu, onto = epilogue
                options: dict[str, Any] = {"relu": relu, "residual": onto}
                found, twice, alone = (given.poisoned() for _ in range(3))
                before(given.x, weight, added, found, norm=given.norm, ahead=ahead_of(weight, 1 << 20), **options)
                plain(given.normed, weight, added, twice, **options)
                plain(given.x, weight, added, alone, **options)
                if before.form.tile.warps_k == plain.form.tile.warps_k:
                    assert torch.equal(found, twice)
                assert_near(found, given.exact, dense, epilogue)
                assert_near(alone, given.x.double(), dense, epilogue)
                if (other := same_sums(before, pattern)) is not None:
                    source, tile = other
                    expected = run_decode(
                        lambda *_, source=source, tile=tile: (source, tile), given.normed, weight, added, onto, rows, columns, relu, streams
                    )
                    assert torch.equal(found, expected)


def same_sums(product: RowProduct, pattern: str) -> tuple[Source, Tile] | None:
    """A form of the kernels for several rows whose warps add the same units, in the same order, if there is one."""
    tile = product.form.tile
    if tile.cluster > 1 or tile.warps_k % (tile.parts if pattern in GROUPS else 1):
        return None
    source = MMA.get(pattern, MMA_UNSTRUCTURED)
    other = fit(source, Tile(1, 1, 1, tile.warps_k, tile.parts, min_blocks=1, table_copies=4), 1, product.depth, gpu(0))
    return (source, other) if other.warps_k == tile.warps_k else None


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "0.5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072, "num_attention_heads": 12},
        {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240, "num_attention_heads": 32, "num_hidden_layers": 2},
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
    product = RowProduct(32, torch.bfloat16, row_of("2:4", 256, 8, 2, 1, 1, 4, 1))
    weight = torch.zeros(2 * 9 * 32 * 16, dtype=torch.uint8, device="cuda")
    x, y = (torch.zeros(1, n, dtype=torch.bfloat16, device="cuda") for n in (256, 32))
    with pytest.raises(InputError, match="x is"):
        product(y, weight, None, y)
    with pytest.raises(InputError, match="a weight of 4608 bytes"):
        product(x, weight[:4608], None, y)
    with pytest.raises(InputError, match="begin at a multiple of 16"):
        product(torch.zeros(1, 257, dtype=torch.bfloat16, device="cuda")[:, 1:], weight, None, y)
    streams = Streams(torch.zeros(4, dtype=torch.int32, device="cuda"), 21, 2)
    stream = RowProduct(32, torch.bfloat16, row_of("unstructured", 256, 8, 2, 4, 1, 4, 1), streams)
    with pytest.raises(InputError, match=r"offsets torch.int32 \(4,\)"):
        stream(x, weight.view(torch.bfloat16), None, y)
    with pytest.raises(InputError, match="words of torch"):
        stream(x, weight, None, y)
    with pytest.raises(InputError, match="takes no LayerNorm"):
        stream(x, weight, None, y, norm=RowNorm(x[0], x[0], 1e-5))
