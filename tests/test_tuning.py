"""The tuning tables: what is written is found again, a user's goes before the shipped, damage is a warning, and dispatch follows them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from sparse_engine import registry, tuning
from sparse_engine.errors import InputError
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Problem
from sparse_engine.tuning import Entry, Measured

GPU = "Test GPU 9000 (80GB)"
SHAPE = (768, 3072)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "shipped_path", lambda gpu: tmp_path / "shipped" / f"{tuning.slug(gpu)}.json")
    tuning._read.cache_clear()
    tuning._lookup.cache_clear()


def record(us: Mapping[str, float | Measured], rows: int = 1, *, shipped: bool = False, dtype: torch.dtype = BF16) -> Path:
    measured = {name: value if isinstance(value, Measured) else Measured(value) for name, value in us.items()}
    entry = Entry("2:4", dtype, SHAPE, rows, measured)
    return tuning.record(GPU, [entry], path=tuning.shipped_path(GPU) if shipped else None)


def times(rows: int, dtype: torch.dtype = BF16) -> dict[str, float]:
    return {name: m.us for name, m in tuning.lookup(GPU, "2:4", dtype, SHAPE, rows).items()}


def test_what_is_recorded_is_found_again() -> None:
    config = ("decode_nm.cu", 1, 2.5, True, None)
    path = record({"cuda_nm": Measured(1.25, config)})
    assert path == tuning.user_path(GPU)
    assert tuning.lookup(GPU, "2:4", BF16, SHAPE, 1) == {"cuda_nm": Measured(1.25, config, tuning.USER)}
    content = json.loads(path.read_text())
    assert content == {
        "gpu": GPU,
        "version": 1,
        "entries": {"2:4": {"bf16": {"768x3072": {"1": {"cuda_nm": [1.25, *config]}}}}},
    }


def test_records_merge_and_leave_nothing_else_behind() -> None:
    record({"a": 1.0, "b": 2.0})
    record({"b": 3.0, "c": 4.0})
    path = record({"a": 9.0}, rows=8)
    assert times(1) == {"a": 1.0, "b": 3.0, "c": 4.0}
    assert times(8) == {"a": 9.0}
    assert [file.name for file in path.parent.iterdir()] == [path.name] == ["test-gpu-9000-80gb.json"]


def test_a_file_has_one_line_per_shape() -> None:
    record({"a": 1.0})
    record({"a": 2.0}, rows=16)
    path = tuning.record(GPU, [Entry("2:4", BF16, (64, 32), 1, {"a": Measured(1.0)})])
    lines = [line for line in path.read_text().splitlines() if "x" in line]
    assert [line.split(":")[0] for line in lines] == ['"64x32"', '"768x3072"']


def test_a_users_time_goes_before_the_shipped_one_kernel_by_kernel() -> None:
    record({"a": Measured(1.0, ("shipped",)), "b": 2.0}, shipped=True)
    record({"a": Measured(5.0, ("own",))})
    found = tuning.lookup(GPU, "2:4", BF16, SHAPE, 1)
    assert found["a"] == Measured(5.0, ("own",), tuning.USER)
    assert found["b"] == Measured(2.0, (), tuning.SHIPPED)


@pytest.mark.parametrize(("rows", "expected"), [(1, 1.0), (2, 4.0), (3, 4.0), (4, 4.0), (5, 16.0), (16, 16.0), (17, None)])
def test_rows_use_the_next_larger_bucket(rows: int, expected: float | None) -> None:
    record({"a": 1.0}, rows=1, shipped=True)
    record({"a": 16.0}, rows=16, shipped=True)
    record({"a": 4.0}, rows=4)
    assert times(rows) == ({} if expected is None else {"a": expected})


def test_a_bucket_of_many_more_rows_says_nothing() -> None:
    record({"a": 1.0}, rows=64)
    assert times(16) == {"a": 1.0}
    assert times(15) == {}


def test_sixteen_bit_types_stand_in_for_each_other() -> None:
    record({"a": 1.0}, dtype=torch.float16)
    assert times(1, torch.bfloat16) == times(1, torch.float16) == {"a": 1.0}
    assert [tuning.lookup(GPU, "2:4", dtype, SHAPE, 1)["a"].stands_in for dtype in (torch.float16, torch.bfloat16)] == [False, True]
    assert times(1, torch.float32) == {}
    record({"a": 2.0}, dtype=torch.bfloat16)
    assert (times(1, torch.bfloat16), times(1, torch.float16)) == ({"a": 2.0}, {"a": 1.0})


def test_patterns_by_name() -> None:
    assert tuning.pattern_key(SparsityPattern.parse("1:4")) == "1:4"
    assert tuning.pattern_key(SparsityPattern.parse("0.7")) == "unstructured"


GOOD = {"2:4": {"bf16": {"768x3072": {"1": {"a": [1.0]}}}}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "it is no JSON"),
        ("[]", "no table of version 1"),
        ({"version": 2}, "no table of version 1"),
        ({"gpu": "another"}, "it is for 'another', not 'Test GPU"),
        ({"entries": None}, "entries is no object"),
        ({"entries": {"2:4": {"int8": {}}}}, "key 'int8' where a type belongs"),
        ({"entries": {"2:4": {"bf16": {"768": {}}}}}, "key '768' where NxK belongs"),
        ({"entries": {"2:4": {"bf16": {"768x3072": {"0": {}}}}}}, "key '0' where M belongs"),
        ({"entries": {"2:4": {"bf16": {"768x3072": {"1": {"a": []}}}}}}, "no list of a time"),
        ({"entries": {"2:4": {"bf16": {"768x3072": {"1": {"a": [1.0, {}]}}}}}}, "no list of a time"),
        ({"entries": {"2:4": {"bf16": {"768x3072": {"1": {"a": [-1.0]}}}}}}, "gives -1.0 for a time"),
        ({"entries": {"2:4": {"bf16": {"768x3072": {"1": {"a": [True]}}}}}}, "gives True for a time"),
        ('{"gpu": "Test GPU 9000 (80GB)", "version": 1, "entries": {"2:4": {"bf16": {"1x1": {"1": {"a": [NaN]}}}}}}', "gives nan"),
    ],
)
def test_a_damaged_table_is_one_warning_and_is_ignored(content: object, reason: str) -> None:
    record({"b": 2.0}, shipped=True)
    path = tuning.user_path(GPU)
    path.parent.mkdir(parents=True)
    whole = {"gpu": GPU, "version": 1, "entries": GOOD}
    path.write_text(json.dumps(whole | content) if isinstance(content, dict) else str(content))
    with pytest.warns(UserWarning, match="tuning table .* is ignored") as caught:
        found = [times(rows) for rows in (1, 2)]
    assert found == [{"b": 2.0}, {}]
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    damaged = path.read_text()
    record({"a": 3.0})
    assert times(1) == {"a": 3.0, "b": 2.0}
    assert path.with_name(path.name + ".damaged").read_text() == damaged


def test_a_table_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        tuning.record(GPU, [], path=tmp_path / "file" / "table.json")


def test_shipped_tables_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    files = sorted(tuning.shipped_path("x").parent.glob("*.json"))
    assert files
    for path in files:
        gpu = json.loads(path.read_text())["gpu"]
        assert tuning.shipped_path(gpu) == path
        entries = tuning._parse(path, gpu)
        assert isinstance(entries, dict), entries
        assert path.read_text() == tuning._dumps(gpu, entries)


PROBLEM = Problem("nm", SparsityPattern.nm(2, 4), BF16, "cuda", *SHAPE, 1, (9, 0), GPU)


@pytest.fixture
def three_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels a, b and c that take everything and estimate 1, 2 and 3 µs, in the place of the real ones."""

    def kernel(called: str, estimate: float) -> registry.Kernel:
        class Fake(registry.Kernel):
            name = called
            formats = frozenset({"nm"})
            devices = frozenset({"cuda"})
            dtypes = frozenset({BF16})

            def cost(self, problem: Problem) -> float:
                return estimate

            def run(self, *_: object) -> torch.Tensor:
                raise AssertionError("never run here")

        return Fake()

    fakes = {name: kernel(name, us) for name, us in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    monkeypatch.setattr(registry, "all_kernels", lambda: fakes)


@pytest.mark.usefixtures("three_kernels")
def test_without_measured_times_the_lowest_estimate_is_chosen() -> None:
    verdicts = registry.explain(PROBLEM)
    assert [(v.kernel, v.cost, v.chosen, v.source) for v in verdicts] == [
        ("a", 1.0, True, registry.ESTIMATE),
        ("b", 2.0, False, registry.ESTIMATE),
        ("c", 3.0, False, registry.ESTIMATE),
    ]


@pytest.mark.usefixtures("three_kernels")
def test_measured_kernels_go_before_estimates_and_the_fastest_of_them_first() -> None:
    record({"b": Measured(50.0, ("tile",)), "unknown": 0.1}, shipped=True)
    record({"c": 40.0})
    verdicts = registry.explain(PROBLEM)
    assert [(v.kernel, v.cost, v.source, v.config) for v in verdicts] == [
        ("c", 40.0, tuning.USER, ()),
        ("b", 50.0, tuning.SHIPPED, ("tile",)),
        ("a", 1.0, registry.ESTIMATE, ()),
    ]
    assert registry.select(PROBLEM).name == "c"
    assert registry.select(PROBLEM, "a").name == "a"
    assert registry.select(PROBLEM.with_rows(2)).name == "a"
