"""Forms for many activation rows: which of them is chosen (on any machine), that they compile, and their products (on a GPU)."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_products import A100, H200, KERNEL_OF, TOLERANCE, make_packed, nvcc
from products import expected_product, relative_error

from sparse_engine import cuda, registry, tuning
from sparse_engine.backends import cuda_prefill, cuda_unstructured
from sparse_engine.backends.cuda_prefill import Call, expand
from sparse_engine.backends.cuda_prefill.expanded import NMForm, UnstructuredForm, fitted
from sparse_engine.backends.cuda_prefill.mma import MmaForm
from sparse_engine.errors import InputError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.registry import Config, Layout
from sparse_engine.tuning import Measured

BF16 = torch.bfloat16
ADA = H200.__class__("NVIDIA L4", "sm_89", 58, False, 101376)
PATTERNS = {"2:4": "2:4", "4:8": "4:8", "unstructured": "0.5"}
NAMES = {"2:4": "cuda_nm", "4:8": "cuda_nm", "unstructured": "cuda_unstructured"}
# Registered ones, and those that wait for being measured.
KNOWN = {form.name: form for form in (MmaForm(), NMForm(), UnstructuredForm())}
KNOWN |= {form.name: form for pattern in PATTERNS for form in cuda_prefill._forms(pattern, H200)}
FORMS = [(pattern, name) for name, form in sorted(KNOWN.items()) for pattern in PATTERNS if pattern in form.patterns]
SHAPES = {"2:4": [(33, 260), (1, 4), (200, 1028), (768, 768)], "4:8": [(33, 264), (1, 8), (200, 1032), (768, 768)]}
SHAPES["unstructured"] = [(33, 263), (1, 3), (1100, 1030), (768, 768)]


def call_of(pattern: str, packed: PackedWeight, layout: Layout, x: torch.Tensor, **epilogue: torch.Tensor | bool | None) -> Call:
    streams = cuda_unstructured.streams_of(layout) if pattern == "unstructured" else None
    fields = {"bias": None, "residual": None, "relu": False} | epilogue
    return Call(pattern, x, layout["weight"], rows=packed.shape[0], columns=packed.shape[1], streams=streams, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("here", [H200, A100], ids=lambda here: here.arch)
@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_some_form_runs_any_number_of_rows(pattern: str, here: cuda_prefill.Gpu) -> None:
    # The same GPU by a name that no table has: there estimates choose.
    unmeasured = replace(here, name="GPU without a table")
    for m in (129, 256, 300, 8192, 100000):
        for gpu in (here, unmeasured):
            form, config = cuda_prefill.choose(NAMES[pattern], pattern, BF16, 4096, 4096, cuda_prefill.bucket_of(m), gpu)
            assert config in form.configs(pattern, 4096, 4096, min(m, 8192), gpu)
        assert not form.needs_measuring
    for rows, columns in ((768, 768), (36864, 9216)):
        for form, configs in cuda_prefill.offered(pattern, rows, columns, 2048, here):
            assert all(config[0] == form.name for config in configs)
            assert len(set(configs)) == len(configs) <= 20
            assert 0 < form.estimate_us(pattern, rows, columns, 2048, here) < 1e5


def test_rows_are_looked_up_by_bucket() -> None:
    assert [cuda_prefill.bucket_of(m) for m in (129, 256, 257, 8192, 9000)] == [256, 256, 512, 8192, 8192]


def test_the_measured_form_runs_and_an_unknown_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    gpu = H200.__class__("Test GPU", "sm_90a", 132, True, 232448)
    # The last two are of other versions: a form that is gone, and one whose tiles had another field.
    known: list[Config] = [("slabs",), ("expand",), ("wgmma-4:8", 16, 1, 2, 6, 1, 2, 1, 1)]
    for measured in (*known, ("of-another-version",), ("wgmma-4:8", 16, 1, 2, 6, 1, 2, 1, 0, 1)):
        tuning.record("Test GPU", [tuning.Entry("4:8", BF16, (64, 64), 256, {"cuda_nm": Measured(1.0, measured)})])
        cuda_prefill.choose.cache_clear()
        form, config = cuda_prefill.choose("cuda_nm", "4:8", BF16, 64, 64, 256, gpu)
        assert form.name == config[0]
        assert (config == measured) == (measured in known)
    cuda_prefill.choose.cache_clear()


def test_tuning_tries_the_likely_ones_first() -> None:
    names = [form.name for form, _ in cuda_prefill.offered("2:4", 12288, 4096, 4096, H200)]
    assert names[0] == "wgmma-sparse"
    assert names.index("expand") > 0


def test_units_of_any_depth_fit_a_hopper_gpu() -> None:
    for source in UnstructuredForm.sources.values():
        for tile in UnstructuredForm.tiles:
            # A unit of columns that are all kept: two streams of eight steps of four words.
            for depth in (1, 44, 64 // source.parts):
                found = fitted(source, tile, depth, H200)
                assert source.fits(found, H200, depth)
                assert found == tile or depth > 44


@pytest.mark.parametrize(("file", "struct"), [("expand_nm.cu", "Params"), ("expand_unstructured.cu", "ExpandParams")])
def test_parameters_match_the_sources(file: str, struct: str) -> None:
    body = re.search(rf"struct {struct} \{{(.*?)\}};", (cuda.source_folder() / file).read_text(), re.S)
    assert body is not None
    declared = [name for line in re.sub(r"//.*", "", body[1]).split(";") for name in re.findall(r"[*\s](\w+)\s*(?:,|$)", line.strip())]
    assert declared == [name for name, _ in expand._Params._fields_]


JOBS = {
    job
    for pattern in PATTERNS
    for here in (H200, A100, ADA)
    for form in KNOWN.values()
    if pattern in form.patterns and form.unsupported(here) is None
    for config in form.configs(pattern, 4096, 4096, 512, here)[:1]
    for job in form.compilations(pattern, BF16, config, here)
}


@pytest.mark.parametrize(("file", "arch", "macros"), sorted(JOBS), ids=str)
def test_forms_compile_without_spills(file: str, arch: str, macros: tuple[tuple[str, int], ...], tmp_path: Path) -> None:
    said = nvcc(arch.removeprefix("sm_"), file, dict(macros), tmp_path)
    spills = re.search(r"(\d+) bytes spill stores", said)
    assert spills is not None
    assert int(spills[1]) == 0
    assert "serialized" not in said


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 129, 257, 640])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("pattern", "name"), FORMS)
def test_every_configuration_matches_fp64(pattern: str, name: str, dtype: torch.dtype, m: int) -> None:
    form, here = KNOWN[name], cuda_prefill.gpu(torch.cuda.current_device())
    if reason := form.unsupported(here):
        pytest.skip(f"{name} {reason}")
    for shape in SHAPES[pattern]:
        packed = make_packed(PATTERNS[pattern], shape, dtype, "cuda", seed=m)
        layout = registry.get(NAMES[pattern]).prepare(packed)
        x, residual = torch.randn(m, shape[1], device="cuda", dtype=dtype), torch.randn(m, shape[0], device="cuda", dtype=dtype)
        bias = torch.randn(shape[0], device="cuda", dtype=dtype)
        plain = expected_product(x, packed, None)
        configs = form.configs(pattern, *shape, m, here) or [(name,)]
        # The types differ in their instructions alone, and every further configuration is compiled.
        for config in configs if dtype is BF16 else configs[:2]:
            torch.full((m, shape[0]), float("nan"), device="cuda", dtype=dtype)
            y = form.run(call_of(pattern, packed, layout, x), config)
            assert y.shape == (m, shape[0])
            assert relative_error(y, plain) < TOLERANCE[dtype], (config, shape)
            torch.full((m, shape[0]), float("nan"), device="cuda", dtype=dtype)
            y = form.run(call_of(pattern, packed, layout, x, bias=bias, residual=residual, relu=True), config)
            assert relative_error(y, (plain + bias.double()).clamp_min(0) + residual.double()) < TOLERANCE[dtype], (config, shape)


@pytest.mark.gpu
@pytest.mark.parametrize(("pattern", "name"), FORMS)
def test_strided_and_unaligned_activations(pattern: str, name: str) -> None:
    form, here = KNOWN[name], cuda_prefill.gpu(torch.cuda.current_device())
    if reason := form.unsupported(here):
        pytest.skip(f"{name} {reason}")
    packed = make_packed(PATTERNS[pattern], (48, 776), BF16, "cuda")
    layout = registry.get(NAMES[pattern]).prepare(packed)
    config = next(iter(form.configs(pattern, 48, 776, 256, here)))
    wide = torch.randn(300, 1601, device="cuda", dtype=BF16)
    for x in (wide[:, :776], wide[:, 1:777], wide[:, :1552:2], wide[::2, 8:784], wide[:, :776].reshape(2, 150, 776)):
        y = form.run(call_of(pattern, packed, layout, x), config)
        assert y.shape == (*x.shape[:-1], 48)
        assert relative_error(y, expected_product(x, packed, None)) < TOLERANCE[BF16]


@pytest.mark.gpu
@pytest.mark.parametrize(("pattern", "name"), FORMS)
def test_graphs_chain_and_side_streams(pattern: str, name: str) -> None:
    form, here = KNOWN[name], cuda_prefill.gpu(torch.cuda.current_device())
    if reason := form.unsupported(here):
        pytest.skip(f"{name} {reason}")
    packed = make_packed(PATTERNS[pattern], (512, 512), BF16, "cuda")
    layout = registry.get(NAMES[pattern]).prepare(packed)
    config = next(iter(form.configs(pattern, 512, 512, 256, here)))
    x = torch.randn(256, 512, device="cuda", dtype=BF16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        side = form.run(call_of(pattern, packed, layout, x), config)
    torch.cuda.current_stream().wait_stream(stream)
    assert relative_error(side, expected_product(x, packed, None)) < TOLERANCE[BF16]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # A chain, so that a kernel reading its input before its predecessor wrote it shows.
        chain = [x * 2]
        for _ in range(4):
            chain.append(form.run(call_of(pattern, packed, layout, chain[-1]), config))
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(256, 512))
        graph.replay()
        for before, after in itertools.pairwise(chain):
            assert relative_error(after, expected_product(before, packed, None)) < TOLERANCE[BF16]


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_kernels_run_many_rows_through_a_form(pattern: str) -> None:
    packed = make_packed(PATTERNS[pattern], (80, 512), BF16, "cuda")
    kernel = registry.get(KERNEL_OF[PATTERNS[pattern]])
    layout = kernel.prepare(packed)
    for m in (128, 129, 1000):
        x = torch.randn(m, 512, device="cuda", dtype=BF16)
        for config in ((), *kernel.configs(registry.Problem.of(packed, m))[:4]):
            y = kernel.run(x, layout, None, packed.pattern) if not config else kernel.run_config(x, layout, None, packed.pattern, config)
            assert relative_error(y, expected_product(x, packed, None)) < TOLERANCE[BF16], config
    with pytest.raises(InputError, match="cast x to the weight's type"):
        kernel.run(x.half(), layout, None, packed.pattern)
    with pytest.raises(InputError, match="x has 256 columns"):
        kernel.run(x[:, :256], layout, None, packed.pattern)
