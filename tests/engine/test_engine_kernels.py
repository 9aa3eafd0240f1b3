"""The small kernels of a decode step: references against torch and transformers (anywhere), kernels against float64 (on a GPU)."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_products import nvcc
from products import relative_error
from torch import Tensor
from torch.nn import functional as F
from transformers.generation import logits_process

from sparse_engine import cuda
from sparse_engine.backends.cuda_levels import LEVELS, quantise_rows
from sparse_engine.engine.kernels import (
    DecodeState,
    Embedding,
    Norm,
    advance,
    attention_decode,
    embed,
    greedy,
    layer_norm,
    penalise,
    sample,
)
from sparse_engine.engine.kernels.append_prompts import _Params as AppendParams
from sparse_engine.engine.kernels.append_prompts import append_prompts
from sparse_engine.engine.kernels.attention import Split, choose_split
from sparse_engine.engine.kernels.attention import _Params as AttentionParams
from sparse_engine.engine.kernels.embed import EmbeddingParams
from sparse_engine.engine.kernels.embed import _Params as EmbedParams
from sparse_engine.engine.kernels.layernorm import _Params as LayerNormParams
from sparse_engine.engine.kernels.layernorm import row_macros
from sparse_engine.engine.kernels.layernorm_levels import _Params as LevelsParams
from sparse_engine.engine.kernels.layernorm_levels import layer_norm_levels, level_macros
from sparse_engine.engine.kernels.sample import StateParams, macros_of, warp
from sparse_engine.engine.kernels.sample import _Params as SampleParams
from sparse_engine.engine.kernels.sample import _PenaltyParams as PenaltyParams
from sparse_engine.errors import InputError

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = list(TOLERANCE)


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "size"), [(12, 64), (1, 8), (5, 6), (40, 128), (3, 80)])
def test_append_prompts(heads: int, size: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(heads)
    # Prompts of rows 2 and 0 in a cache of three rows; the rest of it stays as it was.
    row, place = torch.tensor([2] * 7 + [0] * 3), torch.cat([torch.arange(7), torch.arange(4, 7)])
    qkv = torch.randn(10, 3 * heads * size).to(dtype)
    caches = [poisoned(3, heads, 9, size, dtype=dtype, device=device) for _ in range(2)]
    append_prompts(qkv.to(device), row.to(device), place.to(device), *caches)
    for part, cache in enumerate(caches):
        expected = poisoned(3, heads, 9, size, dtype=dtype, device="cpu")
        for token in range(10):
            expected[row[token], :, place[token]] = qkv.view(10, 3, heads, size)[token, 1 + part]
        assert torch.equal(cache.cpu().nan_to_num(nan=99.0), expected.nan_to_num(nan=99.0))
    with pytest.raises(InputError, match="place is"):
        append_prompts(qkv.to(device), row.to(device), place.int().to(device), *caches)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 768), (3, 8), (7, 512), (2, 2560), (5, 1032), (1, 9216), (2, 16384)])
def test_layer_norm(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(width)
    # A common offset, which a variance by plain sums of squares would lose, and one outlier.
    x = (torch.randn(rows, width) + 20).to(dtype)
    x[0, width // 2] = 300
    weight, bias = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    x, weight, bias = x.to(device), weight.to(device), bias.to(device)
    out = poisoned(rows, width, dtype=dtype, device=device)
    layer_norm(x, weight, bias, 1e-5, out)
    expected = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)
    assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_of_a_sum(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    x, added = (torch.randn(3, 776).to(device, dtype) for _ in range(2))
    weight, bias = (torch.randn(776).to(device, dtype) for _ in range(2))
    expected = x + added
    for total in (poisoned(3, 776, dtype=dtype, device=device), x.clone()):
        out = poisoned(3, 776, dtype=dtype, device=device)
        left = total if not total.isnan().any() else x
        layer_norm(left, weight, bias, 1e-5, out, added=added, total=total)
        assert torch.equal(total, expected)
        normed = F.layer_norm(expected.double(), (776,), weight.double(), bias.double(), 1e-5)
        assert relative_error(out, normed) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("element", list(LEVELS), ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 768), (3, 8), (300, 512), (2, 2568), (5, 1032), (2, 16384)])
def test_levels_of_a_layer_norm(rows: int, width: int, dtype: torch.dtype, element: torch.dtype, device: str) -> None:
    torch.manual_seed(width)
    x = (torch.randn(rows, width) + 20).to(device, dtype)
    weight, bias = (torch.randn(width).to(device, dtype) for _ in range(2))
    normed = poisoned(rows, width, dtype=dtype, device=device)
    layer_norm(x, weight, bias, 1e-5, normed)
    # What the allocator hands out next.
    torch.full((rows, -(-width // 16) * 16), -1, dtype=torch.int8, device=device)
    made, expected = layer_norm_levels(x, weight, bias, 1e-5, element), quantise_rows(normed, element)
    assert (made.values.dtype, made.dtype, len(made)) == (element, dtype, rows)
    assert torch.equal(made.values.view(torch.int8), expected.values.view(torch.int8))
    assert torch.equal(made.scales[:rows], expected.scales[:rows])
    assert made.ahead is None
    bound = torch.tensor([0.25, 3.0], device=device)
    x[rows // 2], bias = 0, torch.zeros_like(bias)
    made = layer_norm_levels(x, weight, bias, 1e-5, element, bound)
    layer_norm(x, weight, bias, 1e-5, normed)
    assert made.ahead is not None
    assert relative_error(made.ahead[0, :rows], 0.25 * normed.double().norm(dim=1) + 3.0) < 1e-5
    assert relative_error(made.ahead[1, :rows], 1 / made.ahead[0, :rows].double()) < 1e-6
    nothing = layer_norm_levels(torch.zeros_like(x), weight, bias, 1e-5, element, torch.zeros(2, device=device))
    assert nothing.ahead is not None
    assert bool((nothing.ahead[0, :rows] > 0).all()), "each has an inverse"


def test_levels_of_a_layer_norm_refuse_what_no_kernel_reads() -> None:
    with pytest.raises(InputError, match="float32 rows of 16"):
        layer_norm_levels(torch.zeros(2, 16), torch.ones(16), torch.zeros(16), 1e-5, torch.int8)
    with pytest.raises(InputError, match="rows of 12"):
        layer_norm_levels(torch.zeros(2, 12, dtype=torch.bfloat16), *(torch.zeros(12, dtype=torch.bfloat16),) * 2, 1e-5, torch.int8)


def test_layer_norm_of_a_constant_row_is_its_bias() -> None:
    bias, out = torch.randn(16), torch.full((1, 16), float("nan"))
    layer_norm(torch.full((1, 16), 3.0), torch.ones(16), bias, 1e-5, out)
    assert torch.equal(out[0], bias)


def make_embedding(batch: int, width: int, dtype: torch.dtype, device: str, *, positions: bool = True, norm: bool = True) -> Embedding:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype)

    after = Norm(draw(width), draw(width), 1e-5, poisoned(batch, width, dtype=dtype, device=device)) if norm else None
    table = draw(130, width) if positions else None
    return Embedding(draw(320, width), table, poisoned(batch, width, dtype=dtype, device=device), after)


def check_embedding(embedding: Embedding, tokens: Tensor, positions: Tensor) -> None:
    rows = embedding.tokens.double()[tokens]
    if embedding.positions is not None:
        rows = rows + embedding.positions.double()[positions.long() + 2]
    tolerance = TOLERANCE[embedding.out.dtype]
    assert relative_error(embedding.out, rows) < tolerance
    if (norm := embedding.norm) is not None:
        # Of the rounded rows, as the layers that follow see them.
        of = embedding.out.double()
        expected = F.layer_norm(of, of.shape[-1:], norm.weight.double(), norm.bias.double(), norm.eps)
        assert relative_error(norm.out, expected) < tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("positions", "norm"), [(True, True), (True, False), (False, False)])
def test_embed(positions: bool, norm: bool, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    for batch, width in ((1, 768), (5, 64), (3, 5120)):
        embedding = make_embedding(batch, width, dtype, device, positions=positions, norm=norm)
        tokens = torch.randint(320, (batch,), device=device)
        at = torch.randint(128, (batch,), device=device, dtype=torch.int32)
        embed(tokens, at, embedding)
        check_embedding(embedding, tokens, at)


def expected_attention(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: list[int], scale: float) -> Tensor:
    batch, heads, _, size = k_cache.shape
    q, k, v = qkv.double().view(batch, 3, heads, 1, size).unbind(1)
    rows = []
    for b, length in enumerate(lengths):
        keys = torch.cat((k_cache[b, :, :length].double(), k[b]), 1)
        values = torch.cat((v_cache[b, :, :length].double(), v[b]), 1)
        rows.append(F.scaled_dot_product_attention(q[b], keys, values, scale=scale).flatten())
    return torch.stack(rows)


def check_attention(lengths: list[int], heads: int, size: int, capacity: int, dtype: torch.dtype, device: str, scale: float = 0.2) -> None:
    batch = len(lengths)
    qkv = torch.randn(batch, 3 * heads * size).to(device, dtype)
    # Positions not yet in use hold NaN: one that is read shows.
    caches = [poisoned(batch, heads, capacity, size, dtype=dtype, device=device) for _ in range(2)]
    for cache in caches:
        for b, length in enumerate(lengths):
            cache[b, :, :length] = torch.randn(heads, length, size).to(device, dtype)
    before = [cache.clone() for cache in caches]
    expected = expected_attention(qkv, *before, lengths, scale)
    out = poisoned(batch, heads * size, dtype=dtype, device=device)
    attention_decode(qkv, *caches, torch.tensor(lengths, dtype=torch.int32, device=device), out, scale)
    assert relative_error(out, expected) < TOLERANCE[dtype]
    for cache, old, new in zip(caches, before, qkv.view(batch, 3, heads, size).unbind(1)[1:], strict=True):
        for b, length in enumerate(lengths):
            old[b, :, length] = new[b]
        # Nothing but the new position has changed.
        assert torch.equal(cache.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[0], [1], [7], [63], [64], [65], [0, 65, 1, 64, 7]], ids=str)
def test_attention(lengths: list[int], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(sum(lengths))
    for size in (64, 80, 56):
        check_attention(lengths, 3, size, 70, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8, 16, 32, 40, 56, 64, 80, 96, 120, 128, 248, 256])
@pytest.mark.parametrize(("batch", "heads"), [(1, 12), (1, 1), (3, 5), (7, 32), (64, 12)])
def test_attention_of_any_head_size_and_batch(batch: int, heads: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(batch)
    lengths = ([1000, 0, 1, 7, 63, 64, 65, 129, 511, 1010] * 7)[:batch]
    check_attention(lengths, heads, size, 1011, dtype, "cuda")


@pytest.mark.gpu
def test_attention_of_large_scores() -> None:
    torch.manual_seed(0)
    check_attention([0, 33, 640], 4, 64, 641, torch.float32, "cuda", scale=8.0)


@pytest.mark.parametrize("device", DEVICES)
def test_attention_over_a_full_cache_writes_nothing(device: str) -> None:
    k_cache, v_cache = (torch.randn(2, 1, 4, 8, device=device) for _ in range(2))
    kept = k_cache.clone(), v_cache.clone()
    lengths = torch.tensor([4, 4], dtype=torch.int32, device=device)
    attention_decode(torch.randn(2, 24, device=device), k_cache, v_cache, lengths, torch.empty(2, 8, device=device), 1.0)
    assert torch.equal(k_cache, kept[0])
    assert torch.equal(v_cache, kept[1])


def make_state(filled: list[int], capacity: int, device: str, *, eos: tuple[int, ...] = (2,), limit: int | None = None) -> DecodeState:
    batch = len(filled)
    counts = torch.tensor(filled, dtype=torch.int32)
    history = torch.randint(5, 12, (batch, capacity))
    history[torch.arange(capacity) >= counts[:, None]] = 1
    return DecodeState(
        tokens=torch.full((batch,), -9, device=device),
        lengths=(counts - 1).to(device),
        history=history.to(device),
        filled=counts.to(device),
        limits=torch.full((batch,), limit or capacity, dtype=torch.int32, device=device),
        finished=torch.zeros(batch, dtype=torch.bool, device=device),
        eos=torch.tensor(eos, dtype=torch.int64, device=device),
        pad=1,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_advance(device: str) -> None:
    state = make_state([3, 4, 5, 7, 2], 8, device, eos=(2, 300), limit=7)
    state.finished[4] = True
    embedding = make_embedding(5, 64, torch.float32, device)
    before = state.history.clone()
    # An ordinary token, each of the two EOS tokens, one that meets the limit (which row 3 has passed), one for a finished row.
    advance(state, torch.tensor([40, 2, 300, 41, 42], device=device), embedding)
    assert state.tokens.tolist() == [40, 2, 300, 41, 1]
    assert state.filled.tolist() == [4, 5, 6, 8, 2]
    assert state.lengths.tolist() == [3, 4, 5, 7, 1]
    assert state.finished.tolist() == [False, True, True, True, True]
    before[range(4), [3, 4, 5, 7]] = state.tokens[:4]
    assert torch.equal(state.history, before)
    check_embedding(embedding, state.tokens, state.lengths)
    advance(state, torch.tensor([43, 43, 43, 43, 43], device=device))
    assert state.tokens.tolist() == [43, 1, 1, 1, 1]
    assert state.filled.tolist() == [5, 5, 6, 8, 2]
    assert state.lengths.tolist() == [4, 4, 5, 7, 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [320, 1, 7, 50272, 50265])
def test_greedy_takes_the_first_of_the_largest(vocabulary: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(vocabulary)
    batch = 6
    logits = torch.randn(batch, vocabulary).to(dtype)
    # Equal maxima far apart, all equal, all -inf, the last the largest.
    logits[1, vocabulary // 3 :: 3] = 9
    logits[2] = 0.5
    logits[3] = -torch.inf
    logits[4, -1] = 20
    state = make_state([3, 1, 2, 3, 4, 5], 8, device)
    embedding = make_embedding(batch, 768, torch.bfloat16, device) if vocabulary == 320 else None
    greedy(logits.to(device), state, embedding)
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert state.tokens.tolist() == expected
    assert state.history.cpu()[range(batch), [3, 1, 2, 3, 4, 5]].tolist() == expected
    assert state.finished.tolist() == [token == 2 for token in expected]
    if embedding is not None:
        check_embedding(embedding, state.tokens, state.lengths)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("penalty", "ngram"), [(1.0, 0), (1.3, 0), (0.8, 2), (1.0, 1), (1.2, 3), (1.0, 4)])
def test_penalties_equal_those_of_transformers(penalty: float, ngram: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(ngram)
    filled = [40, 1, 2, 3, 33]
    state = make_state(filled, 48, device)
    logits = torch.randn(5, 50272).to(device, dtype)
    logits[:, 5:12] += 3
    scores = poisoned(5, 50272, dtype=torch.float32, device=device)
    penalise(logits, state.history, state.filled, scores, repetition_penalty=penalty, no_repeat_ngram_size=ngram)
    for b, count in enumerate(filled):
        ids, row = state.history[b : b + 1, :count], logits[b : b + 1].float()
        row = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(ids, row)
        if ngram:
            row = logits_process.NoRepeatNGramLogitsProcessor(ngram)(ids, row)
        assert torch.equal(scores[b : b + 1], row)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 50, 1.0), (1.5, 0, 0.9), (0.6, 40, 0.5), (1.0, 1, 0.1)])
def test_warping_equals_that_of_transformers(temperature: float, top_k: int, top_p: float, device: str) -> None:
    torch.manual_seed(top_k)
    scores = torch.randn(4, 1000, device=device) * 3
    scores[2, ::2] = -torch.inf
    scores[3, :20] = 11.0
    expected = logits_process.TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        expected = logits_process.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = logits_process.TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(warp(scores, temperature, top_k, top_p), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_samples_follow_their_distribution(device: str) -> None:
    torch.manual_seed(0)
    row = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf, 1.5])
    chosen = torch.full((20000,), -1, device=device)
    sample(row.to(device).expand(20000, 6).contiguous(), chosen, temperature=0.8, top_k=4)
    found = chosen.bincount(minlength=6).cpu() / 20000
    expected = warp(row[None], 0.8, 4, 1.0).softmax(-1)[0]
    assert torch.equal(found[expected == 0], torch.zeros(2))
    assert (found - expected).abs().max() < 0.02


def closed_loop(device: str, dtype: torch.dtype, batch: int, steps: int, in_graph: int = 0) -> tuple[Tensor, Tensor]:
    """(history, lengths) after ``steps`` of a decoder made of these kernels alone, ``in_graph`` of them to a CUDA graph (0: none).

    An embedding is the next token's q, k and v, and normalised attention its logits: nothing but the kernels' own order keeps one from
    reading too early.
    """
    torch.manual_seed(0)
    heads, size, capacity = 3, 64, 160
    width = heads * size

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype)

    embedding = Embedding(draw(width, 3 * width), draw(capacity + 2, 3 * width), draw(batch, 3 * width))
    weight, bias, caches = draw(width), draw(width), [draw(batch, heads, capacity, size) for _ in range(2)]
    attended, logits = draw(batch, width), draw(batch, width)
    state = make_state([1 + 9 * b % 70 for b in range(batch)], capacity, device, eos=(width,))
    state.tokens.fill_(5)
    embed(state.tokens, state.lengths, embedding)

    def step() -> None:
        attention_decode(embedding.out, *caches, state.lengths, attended, 0.1)
        layer_norm(attended, weight, bias, 1e-5, logits)
        greedy(logits, state, embedding)

    if in_graph:
        kept = [t.clone() for t in (state.tokens, state.lengths, state.history, state.filled, embedding.out, *caches)]
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(in_graph):
                step()
        for tensor, old in zip((state.tokens, state.lengths, state.history, state.filled, embedding.out, *caches), kept, strict=True):
            tensor.copy_(old)
        for _ in range(steps // in_graph):
            graph.replay()
    else:
        for _ in range(steps):
            step()
    return state.history.cpu(), state.lengths.cpu()


def test_steps_append_and_advance() -> None:
    history, lengths = closed_loop("cpu", torch.float32, 3, 6)
    assert lengths.tolist() == [6, 15, 24]
    assert (history[torch.arange(160) >= lengths[:, None] + 1] == 1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("in_graph", [0, 1, 4])
@pytest.mark.parametrize("batch", [1, 7])
def test_steps_in_a_graph_follow_the_reference(batch: int, in_graph: int) -> None:
    expected, lengths = closed_loop("cpu", torch.float32, batch, 80)
    for _ in range(3):
        found, counted = closed_loop("cuda", torch.float32, batch, 80, in_graph)
        assert torch.equal(counted, lengths)
        assert torch.equal(found, expected)


SOURCES: dict[str, list[dict[str, int]]] = {
    "layernorm.cu": [row_macros(width, dtype) for width, dtype in ((768, torch.bfloat16), (16384, torch.float32))],
    "layernorm_levels.cu": [
        level_macros(width, dtype, element)
        for width, dtype, element in (
            (768, torch.bfloat16, torch.int8),
            (16384, torch.float16, torch.float8_e4m3fn),
            (9216, torch.bfloat16, torch.float8_e4m3fn),
        )
    ],
    "append_prompts.cu": [{}],
    "embed.cu": [row_macros(width, dtype) for width, dtype in ((512, torch.float16), (9216, torch.float32))],
    "attention_decode.cu": [
        choose_split(batch, 12, size, dtype.itemsize, 1024, 132, True).macros(size, dtype)
        for batch, size, dtype in (
            (1, 64, torch.bfloat16),
            (64, 128, torch.float16),
            (1, 80, torch.bfloat16),
            (8, 96, torch.bfloat16),
            (1, 256, torch.float32),
            (2, 8, torch.float16),
            (1, 120, torch.bfloat16),
            (1, 248, torch.float32),
        )
    ],
    "sample.cu": [
        macros_of(torch.bfloat16, make_embedding(1, 768, torch.bfloat16, "cpu")),
        macros_of(None, make_embedding(1, 9216, torch.float32, "cpu")),
        macros_of(torch.float16, None, chunk=True),
    ],
}


@pytest.mark.parametrize(("source", "macros"), [(source, macros) for source, all_of in SOURCES.items() for macros in all_of], ids=str)
def test_sources_compile_within_their_registers(source: str, macros: dict[str, int], tmp_path: Path) -> None:
    # Of each source one form for Ampere as well, which has neither clusters nor programmatic launch.
    for arch in ("90a", "80") if macros == SOURCES[source][0] else ("90a",):
        spilled = [int(count) for count in re.findall(r"(\d+) bytes spill stores", nvcc(arch, source, macros, tmp_path))]
        assert spilled
        # A few registers may spill in blocks of 1,024 threads, which have 64 each.
        assert max(spilled) <= 32


@pytest.mark.parametrize(
    ("source", "struct", "fields"),
    [
        ("layernorm.cu", "Params", LayerNormParams),
        ("layernorm_levels.cu", "Params", LevelsParams),
        ("append_prompts.cu", "Params", AppendParams),
        ("embed.cu", "Params", EmbedParams),
        ("include/embedding.cuh", "Embedding", EmbeddingParams),
        ("attention_decode.cu", "Params", AttentionParams),
        ("include/advance.cuh", "State", StateParams),
        ("sample.cu", "Params", SampleParams),
        ("sample.cu", "PenaltyParams", PenaltyParams),
    ],
)
def test_parameters_match_the_source(source: str, struct: str, fields: type[ctypes.Structure]) -> None:
    body = re.search(rf"struct {struct} \{{(.*?)\}};", (cuda.source_folder() / source).read_text(), re.S)
    assert body is not None
    plain = re.sub(r"//.*", "", body[1])
    declared = [name for line in plain.split(";") for name in re.findall(r"[*\s](\w+)\s*(?:,|$)", line.strip())]
    assert declared == [name for name, *_ in fields._fields_]


@pytest.mark.parametrize("clusters", [True, False])
@pytest.mark.parametrize("size", [8, 56, 64, 80, 128, 248, 256])
def test_chosen_splits_fit_the_gpu(size: int, clusters: bool) -> None:
    for batch in (1, 2, 7, 64, 500):
        for heads in (1, 12, 40):
            split = choose_split(batch, heads, size, 2, 2048, 132, clusters)
            assert split.blocks in ((1, 2, 4, 8) if clusters else (1,))
            assert 4 <= split.warps <= 16
            # Either one block for each head, or no more than are resident at once.
            assert split == Split(1, 4, split.unroll, split.resident) or (
                batch * heads * split.blocks * split.warps <= 132 * split.resident
            )


def test_wrong_arguments_are_refused() -> None:
    x, weight = torch.zeros(2, 16), torch.ones(16)
    with pytest.raises(InputError, match="multiple of 8"):
        layer_norm(torch.zeros(2, 12), weight, weight, 1e-5, x)
    with pytest.raises(InputError, match=r"out is torch\.float32"):
        layer_norm(x, weight, weight, 1e-5, torch.empty(2, 32)[:, ::2])
    cache = torch.zeros(1, 2, 4, 8)
    with pytest.raises(InputError, match=r"lengths is torch\.int64"):
        attention_decode(torch.zeros(1, 48), cache, cache.clone(), torch.zeros(1, dtype=torch.int64), torch.empty(1, 16), 1.0)
    with pytest.raises(InputError, match="repetition_penalty is 0"):
        penalise(x, torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, dtype=torch.int32), torch.empty(2, 16), repetition_penalty=0)
    with pytest.raises(InputError, match="temperature 0"):
        sample(x, torch.zeros(2, dtype=torch.int64), temperature=0)
    state = replace(make_state([1, 1], 4, "cpu"), filled=torch.ones(2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"filled is torch\.int64"):
        advance(state, torch.zeros(2, dtype=torch.int64))
