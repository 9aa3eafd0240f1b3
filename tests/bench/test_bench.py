"""The commands bench and tune: what they refuse, what they write, how tables come out, and the parts of tuning that need no GPU."""

from __future__ import annotations

import ctypes
import json
import re
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_engine import cuda, native, registry, tuning
from sparse_engine.bench import conditions, linear_gpu, read_floor, report, run
from sparse_engine.bench import tune as bench_tune
from sparse_engine.bench.shapes import _random_groups
from sparse_engine.bench.suite import FIELDS, Suite, key_of, wrong_field
from sparse_engine.bench.timing import take_turns
from sparse_engine.bench.tune import Bucket, Candidate, buckets, pending, settle, tune
from sparse_engine.cli import main
from sparse_engine.cli.common import parse_rows, regime_rows, split_list
from sparse_engine.cli.tune import _wanted
from sparse_engine.convert import convert
from sparse_engine.errors import InputError, KernelUnavailableError
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Problem
from sparse_engine.tuning import Entry, Measured

CPU = torch.device("cpu")
BF16 = torch.bfloat16
TWO_FOUR, HALF = SparsityPattern.nm(2, 4), SparsityPattern.unstructured(0.5)
needs_native = pytest.mark.skipif(native.available() is not None, reason=f"the native library cannot be used: it {native.available()}")


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in an empty working directory; gives the exit code and both outputs."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        assert isinstance(stopped.value.code, int)
        return (stopped.value.code, *capfd.readouterr())

    return command


@needs_native
def test_bench_on_a_cpu_writes_the_schema_a_table_and_goes_on(cli, tmp_path: Path) -> None:
    arguments = ("bench", "--device", "cpu", "--shape", "16x64", "--patterns", "2:4,unstructured", "--seconds", "0.001", "--out", "results")
    code, printed, errors = cli(*arguments, "--rows", "1", "--dtypes", "fp32")
    assert code == 0, errors
    path = tmp_path / "results" / "linear-decode.json"
    content = run.read_results(path)
    assert {(row["pattern"], row["m"], row["layer"]) for row in content["rows"]} == {("2:4", 1, "16x64"), ("unstructured", 1, "16x64")}
    for row in content["rows"]:
        assert wrong_field(row) is None
        assert row["cusparselt_us"] is None
        assert row["rel_error"] < 1e-5
        assert row["kernel"] == "cpu"
    for key in ("command", "commit", "cpu", "date", "isa", "threads", "torch", "load_average_1min"):
        assert key in content["environment"]
    assert "| 16 × 64 |" in printed
    assert "16 × 64" in path.with_suffix(".md").read_text()
    before = content["rows"]

    assert cli(*arguments, "--rows", "1,3", "--dtypes", "fp32", "--resume")[0] == 0
    rows = run.read_results(path)["rows"]
    assert rows[:2] == before
    assert [row["m"] for row in rows] == [1, 1, 3, 3]

    content = json.loads(path.read_text())
    content["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    code, _, errors = cli(*arguments, "--rows", "1", "--dtypes", "fp32", "--resume")
    assert (code, errors.count("\n")) == (2, 1)
    assert "measured with torch 1.0" in errors


@needs_native
def test_quantised_values_and_many_rows_on_a_cpu(cli, tmp_path: Path) -> None:
    base = ("bench", "--device", "cpu", "--shape", "1040x64", "--seconds", "0.001", "--out", "r")
    code, _, errors = cli(*base, "--rows", "128", "--dtypes", "int8,int4")
    assert code == 0, errors
    rows = run.read_results(tmp_path / "r" / "linear-prefill.json")["rows"]
    assert {(held["pattern"], held["values"]) for held in rows} == {
        (p, v) for p in ("2:4", "4:8", "unstructured") for v in ("int8", "int4")
    }
    for held in rows:
        assert 1e-4 < held["rel_error"] < 2e-2, "the activations were rounded to int8"


@needs_native
def test_a_forced_backend_is_the_one_measured_and_its_rejections_are_told(cli, tmp_path: Path) -> None:
    base = ("bench", "--device", "cpu", "--shape", "16x64", "--rows", "1", "--seconds", "0.001", "--patterns", "2:4", "--out", "r")
    assert cli(*base, "--backend", "reference")[0] == 0
    assert [row["kernel"] for row in run.read_results(tmp_path / "r" / "linear-decode.json")["rows"]] == ["reference"]
    code, _, errors = cli(*base, "--backend", "cuda_nm")
    assert code == 2
    assert "left out: backend cuda_nm cannot run this product: it runs on cuda, not cpu" in errors
    assert "runs none of the products" in errors


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--models", "gpt-2"), "unknown model 'gpt-2': use opt-125m"),
        (("--layers", "fc3"), "unknown layer 'fc3'"),
        (("--patterns", "3:4"), "unknown pattern '3:4'"),
        (("--dtypes", "int3"), "unknown dtype 'int3'"),
        (("--rows", "0"), "--rows takes whole numbers from 1"),
        (("--rows", "1,x"), "not 'x'"),
        (("--shape", "16"), "cannot read --shape '16'"),
        (("--shape", "16x63"), "2:4 cannot divide"),
        (("--backend", "magic"), "unknown backend 'magic'"),
        (("--threads", "0"), "--threads must be 1 or more"),
        (("--device", "tpu"), "--device"),
    ],
)
def test_bench_refuses_in_one_sentence(cli, arguments: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    code, out, errors = cli("bench", "--device", "cpu", *arguments)
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert reason in errors
    assert not list(tmp_path.iterdir())


def test_bench_and_tune_say_what_they_need(cli) -> None:
    for command in ("bench", "tune"):
        code, out, _ = cli(command, "--help")
        assert code == 0
        assert f"Example: sparse-engine {command}" in out
    if not torch.cuda.is_available():
        code, out, errors = cli("tune", "--models", "opt-125m")
        assert (code, out, errors.count("\n")) == (2, "", 1)
        assert "needs a CUDA device, and torch sees none" in errors


def test_lists_take_commas_or_repetition() -> None:
    assert split_list(["a,b", " c "]) == ["a", "b", "c"]
    assert split_list(None) == []
    assert parse_rows(["1,16", "4"]) == [1, 16, 4]


def test_what_tune_is_asked_for(tiny_opt: Path) -> None:
    wanted = _wanted(None, ["opt-125m"], ["2:4"], None, [1])
    assert {b.shape for b in wanted} == {(768, 768), (2304, 768), (3072, 768), (768, 3072)}
    assert {(b.pattern, b.dtype, b.rows) for b in wanted} == {(TWO_FOUR, BF16, 1)}
    quantised = _wanted(None, ["opt-125m"], ["2:4"], "int8", [256])
    assert {(b.key, b.dtype, b.value_type, str(b.problem(torch.device("cpu")).value_type)) for b in quantised} == {
        ("2:4 int8", BF16, "int8", "int8")
    }
    assert {b.shape for b in _wanted(str(tiny_opt), [], ["2:4"], "fp16", [1])} == {(64, 64), (128, 64), (64, 128)}
    for arguments, reason in (
        ((None, ["opt-1b"], [], None, [1]), "unknown --models opt-1b"),
        ((None, [], ["5:4"], None, [1]), "keeps N of M"),
        ((None, [], [], "int3", [1]), "unknown --dtype"),
        ((str(tiny_opt), ["opt-125m"], [], None, [1]), "not both"),
        ((str(tiny_opt), [], [], None, [1]), "is dense; say what"),
    ):
        with pytest.raises(InputError, match=reason):
            _wanted(*arguments)


def test_tune_takes_a_packed_checkpoints_own_layers(tiny_opt: Path, tmp_path: Path) -> None:
    for pattern in (TWO_FOUR, HALF):
        convert(tiny_opt, tmp_path / str(pattern), pattern=pattern)
        wanted = _wanted(str(tmp_path / str(pattern)), [], [], None, [1, 8])
        assert [(b.shape, b.rows) for b in wanted] == [(s, m) for s in ((64, 64), (64, 128), (128, 64)) for m in (1, 8)]
        assert {(tuning.pattern_key(b.pattern), b.dtype) for b in wanted} == {(tuning.pattern_key(pattern), torch.float32)}
        with pytest.raises(InputError, match="has its own patterns"):
            _wanted(str(tmp_path / str(pattern)), [], ["2:4"], None, [1])


def test_buckets_leave_out_what_a_pattern_cannot_carry() -> None:
    found = buckets([(8, 12), (2, 4), (8, 12)], [TWO_FOUR, SparsityPattern.nm(4, 8), HALF], [BF16], [4, 1])
    assert [(b.shape, str(b.pattern), b.rows) for b in found] == [
        *(((2, 4), "2:4", m) for m in (1, 4)),
        *(((2, 4), "0.5", m) for m in (1, 4)),
        *(((8, 12), "2:4", m) for m in (1, 4)),
        *(((8, 12), "0.5", m) for m in (1, 4)),
    ]


def test_only_what_lacks_a_kernel_is_pending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("nm", TWO_FOUR, BF16, "cuda", 64, 64, 1, (9, 0), "Test GPU")
    monkeypatch.setattr(Bucket, "problem", lambda self, device: problem.with_rows(self.rows))
    monkeypatch.setattr(registry, "all_kernels", lambda: {name: registry._KERNELS[name] for name in ("dense", "reference", "cpu")})
    assert registry.get("dense")
    path = tmp_path / "table.json"
    wanted = buckets([(64, 64)], [TWO_FOUR], [BF16], [1, 2, 4])
    assert pending(wanted, CPU, path) == wanted
    entries = [Entry("2:4", BF16, (64, 64), rows, {name: Measured(1.0)}) for rows, name in ((1, "dense"), (2, "cuda_nm"))]
    tuning.record("Test GPU", entries, path=path)
    assert [bucket.rows for bucket in pending(wanted, CPU, path)] == [2, 4]
    assert pending(wanted, CPU, path, {"cuda_nm"}) == []


class FakeReplay:
    def __init__(self, *times: float) -> None:
        self.times, self.calls = list(times), 0

    def us(self) -> float:
        self.calls += 1
        return self.times[min(self.calls, len(self.times)) - 1]


def candidate(kernel: str, config: tuple[int, ...], us: float, *later: float) -> Candidate:
    replay: Any = FakeReplay(*(later or (us,)))
    return Candidate(registry.get(kernel), config, replay, us)


def test_close_candidates_take_turns_and_each_kernel_keeps_its_fastest() -> None:
    tried = [
        candidate("cpu", (1,), 10.0, 12.0),
        candidate("cpu", (2,), 11.0, 10.5),
        candidate("cpu", (3,), 14.0, 1.0),
        candidate("dense", (), 25.0, 24.0),
        candidate("reference", (), 500.0, 1.0),
    ]
    settled = settle(tried)
    assert settled == {"cpu": Measured(10.5, (2,)), "dense": Measured(24.0), "reference": Measured(500.0)}
    calls = [c.replay.calls for c in tried]
    assert calls[2] == calls[4] == 0, "too slow in its first replays to be worth more"
    assert calls[0] == calls[1] == calls[3] > 5
    assert settle([]) == {}


def test_turns_give_medians_without_the_first_round() -> None:
    replays: Any = {"a": FakeReplay(100.0, 1.0, 2.0, 3.0), "b": FakeReplay(5.0)}
    assert take_turns(replays, 3) == {"a": 2.0, "b": 5.0}


def row(**changes: Any) -> dict[str, Any]:
    whole = {"model": "opt-125m", "layer": "fc1", "n": 3072, "k": 768, "m": 1, "pattern": "2:4", "values": "bf16", "kernel": "cuda_nm"}
    times = {"us": 1.0, "dense_us": 2.0, "best_dense_us": 1.5, "cusparselt_us": None, "gb_per_s": 1.0, "tflops": 1.0}
    return whole | times | {"limit_share": None, "rel_error": 1e-3} | changes


def test_every_field_of_the_schema_is_checked(tmp_path: Path) -> None:
    assert wrong_field(row()) is None
    for name in FIELDS:
        assert wrong_field({key: value for key, value in row().items() if key != name}) == name
    assert wrong_field(row(n=1.5)) == "n"
    assert wrong_field(row(us="1")) == "us"
    assert key_of(row()) != key_of(row(m=2))
    path = tmp_path / "r.json"
    for text, reason in (
        ("{", "no JSON"),
        ("{}", "no results"),
        (json.dumps({"environment": {}, "rows": [row(m=None)]}), "row 0 has no valid m"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=reason):
            run.read_results(path)


def test_tables_are_geometric_means_per_class_and_model() -> None:
    rows = [row(n=n, k=k, us=us, limit_share=0.5, cusparselt_us=4.0 * us) for (n, k), us in {(3072, 768): 1.0, (768, 768): 0.25}.items()]
    rows += [row(model="opt-66b", n=36864, k=9216, m=m, us=us) for m, us in ((1, 4.0), (2, 1.0), (16, 4.0))]
    rows += [row(model="opt-66b", n=36864, k=9216, m=1, pattern="4:8", us=2.0)]
    lines = report.by_class(rows).splitlines()
    assert lines[0] == "| geometric means | 2:4 bf16 | 4:8 bf16 | 2:4 over searched cuSPARSELt |"
    assert lines[2:] == [
        "| M = 1, dense weight of 128 MB and more | 0.50× (0.38×) | 1.00× (0.75×) | – |",
        "| M = 1, OPT-125m | 4.00× (3.00×), 50% | – | 4.00× |",
        "| M = 2 … 16, 128 MB and more | 1.00× (0.75×) | – | – |",
    ]
    assert "| opt-66b | 0.50× (0.38×) | 0.50× (0.38×) | – | 1.00× (0.75×) | – | – |" in report.by_model(rows, (1, 16, 64))
    few = {"environment": {}, "rows": rows}
    assert report.linear_tables(few) == report.by_width(rows) + "\n" + report.by_shape(rows)
    assert report.by_width(rows).splitlines()[2:4] == [
        "| M = 1, 2048 wide and more | 0.50× (0.38×) | 1.00× (0.75×) |",
        "| M = 1, narrower | 4.00× (3.00×) | – |",
    ]
    one = {"environment": {}, "rows": [held for held in rows if held["m"] == 1]}
    assert report.linear_tables(one) == report.by_shape(one["rows"])
    many = {"environment": {}, "rows": [row(n=n) for n in range(16, 32)]}
    assert report.linear_tables(many).count("geometric means") == 1
    assert "linears of" in report.linear_tables(many)


def test_a_gpus_many_rows_are_told_with_clock_and_power() -> None:
    rows = [
        row(m=m, n=n, k=n, us=us, sm_mhz=mhz) for m, n, us, mhz in ((256, 2048, 1.0, 1700), (256, 4096, 4.0, 1800), (256, 768, 2.0, None))
    ]
    rows += [row(m=1024, n=4096, k=2048, pattern="4:8", us=2.0, limit_share=0.6, power_w=650.4, sm_mhz=1500)]
    content = {"environment": {"gpu": "Test GPU"}, "rows": rows}
    assert report.linear_tables(content) == report.by_rows(rows) + "\n" + report.by_model(rows, (256, 1024, 4096))
    assert report.by_rows(rows).splitlines() == [
        "| geometric means | 2:4 bf16 | 4:8 bf16 | 2:4 over searched cuSPARSELt | clock | power |",
        "| --- | --- | --- | --- | --- | --- |",
        "| M = 256, 2048 wide and more | 1.00× (0.75×) | – | – | 1750 MHz | – |",
        "| M = 256, narrower | 1.00× (0.75×) | – | – | – | – |",
        "| M = 1024, 2048 wide and more | – | 1.00× (0.75×), 60% | – | 1500 MHz | 650 W |",
    ]
    assert conditions.summary(rows) == {"power_w": [650.4] * 3, "sm_mhz": [1500, 1700, 1800]}


def test_a_regime_names_its_rows_and_its_file(cli) -> None:
    for device, least in (("cpu", 128), ("cuda", 256)):
        assert run.name_of(Suite(rows=(least, 8192)), torch.device(device)) == "linear-prefill"
        assert run.name_of(Suite(rows=(least - 1, 8192)), torch.device(device)) == "linear-decode"
    assert regime_rows("decode")[-1] == 128
    assert regime_rows("prefill") == [256, 512, 1024, 2048, 4096, 8192]
    assert {*regime_rows("prefill")} < {*registry.ROW_BUCKETS}
    for command in ("bench", "tune"):
        code, out, errors = cli(command, "--regime", "training", *(() if command == "tune" else ("--device", "cpu")))
        assert (code, out, errors.count("\n")) == (2, "", 1)
    assert cli("bench", "--device", "cpu", "--budget", "0")[0] == 2


def test_a_budget_is_shared_by_the_rows_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    pace = linear_gpu.Pace(10.0, 10)
    assert pace.rounds(0.1) == 9, "a second for each row, the uncounted round left out"
    now[0] += 2.0
    pace.done(1.0)
    # 8 s for 9 rows that each take a second beside their rounds: the least that a median needs.
    assert pace.rounds(0.1) == 3
    assert linear_gpu.Pace(None, 10).rounds(100.0) == linear_gpu.Pace(1e9, 10).rounds(0.1) == 11


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (16, 32)])
def test_random_weights_keep_what_the_pattern_says_wherever_they_can(n: int, m: int) -> None:
    keep = _random_groups(4096, n, m, "cpu")
    assert (keep.sum(1) == n).all()
    assert float((keep.double().mean(0) - n / m).abs().max()) < 0.05


def test_the_tensor_cores_limit_is_half_for_two_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    assert conditions.sample(CPU, lambda: None, 1.0) == {"power_w": None, "sm_mhz": None}
    nvml: Any = type("Nvml", (), {"most_sm_mhz": lambda self: 2000})()
    monkeypatch.setattr(conditions, "_of", lambda device: nvml)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"multi_processor_count": 100}))
    place = torch.device("cuda")
    # 4096 floating-point operations a clock, 100 processors, 2 GHz: 819 TFLOP/s.
    assert conditions.tensor_limit_us(place, HALF, BF16, 4096, 4096, 4096) == pytest.approx(2 * 4096**3 / 819.2e6)
    assert conditions.tensor_limit_us(place, TWO_FOUR, BF16, 4096, 4096, 4096) == pytest.approx(4096**3 / 819.2e6)
    assert conditions.tensor_limit_us(place, TWO_FOUR, BF16, 4096, 4096, 4096, "fp8") == pytest.approx(4096**3 / 1638.4e6)
    assert conditions.tensor_limit_us(place, HALF, torch.float32, 64, 64, 64) is None


def test_plot_is_the_same_file_for_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    content = {"environment": {"gpu": "Test GPU"}, "rows": [row(), row(m=16), row(pattern="4:8")]}
    for name in ("one.svg", "two.svg"):
        report.plot(content, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_parameters_match_the_source_of_the_read_floor() -> None:
    body = re.search(r"struct Params \{(.*?)\};", (cuda.source_folder() / "read_floor.cu").read_text(), re.S)
    assert body is not None
    declared = re.findall(r"(\w+);", re.sub(r"//.*", "", body[1]))
    assert declared == [name for name, _ in read_floor._Params._fields_]
    assert ctypes.sizeof(read_floor._Params) == 24


class CalledReplay:
    """In the place of a captured graph: the products are called, and the wall clock is read."""

    def __init__(self, products: Any, pool: object = None) -> None:
        self.products = tuple(products)

    count = 1

    def start(self) -> None:
        self.us()

    def us(self) -> float:
        begun = time.perf_counter()
        for product in self.products:
            product()
        return (time.perf_counter() - begun) * 1e6 / len(self.products)

    def median_us(self, replays: int) -> float:
        return statistics.median(self.us() for _ in range(replays))


@pytest.fixture
def gpu_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU paths do between their launches, on the CPU: its kernels pass for a GPU's, and graphs are calls."""
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path / "cache"))
    of = Problem.of
    monkeypatch.setattr(Problem, "of", lambda packed, rows, device=None: replace(of(packed, rows, device), gpu="Test GPU"))
    for module in (bench_tune, linear_gpu):
        monkeypatch.setattr(module, "Replay", CalledReplay)
        monkeypatch.setattr(
            module, "copies_of", lambda layout, device, caches=None: [dict(layout), {n: t.clone() for n, t in layout.items()}]
        )
    monkeypatch.setattr(linear_gpu, "read_products", lambda data, blocks: [d.sum for d in data])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")


@needs_native
@pytest.mark.usefixtures("gpu_in_name")
def test_tuning_records_every_able_kernel_and_leaves_out_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(registry.Kernel):
        name = "broken"
        formats = frozenset({"nm"})
        devices = frozenset({"cpu"})
        dtypes = frozenset({BF16})

        def cost(self, problem: Problem) -> float:
            return 1e9

        def configs(self, problem: Problem) -> list[tuple[str]]:
            return [("wrong",), ("refused",), ("right",)]

        def run(self, x: torch.Tensor, layout: Any, bias: torch.Tensor | None, pattern: SparsityPattern) -> torch.Tensor:
            return registry.get("cpu").run(x, layout, bias, pattern)

        def run_config(self, x: Any, layout: Any, bias: Any, pattern: Any, config: Any) -> torch.Tensor:
            if config == ("refused",):
                raise RuntimeError("no such algorithm")
            return self.run(x, layout, bias, pattern) * (2 if config == ("wrong",) else 1)

    kernels = {name: registry.get(name) for name in ("cpu", "dense", "reference")} | {"broken": Broken()}
    monkeypatch.setattr(registry, "all_kernels", lambda: kernels)
    path, told = tmp_path / "table.json", []
    wanted = buckets([(32, 64), (64, 64)], [TWO_FOUR, HALF], [BF16], [1, 3])
    outcome = tune(wanted, CPU, path, seconds=5, report=lambda bucket, measured: told.append((bucket, set(measured))))
    assert [bucket for bucket, _ in told] == wanted
    assert {frozenset(names) for bucket, names in told if bucket.pattern == TWO_FOUR} == {frozenset({"cpu", "dense", "broken"})}
    assert {frozenset(names) for bucket, names in told if bucket.pattern == HALF} == {frozenset({"cpu", "dense"})}
    assert outcome.measured == 8
    assert len(outcome.wrong) == 4
    assert "2:4 bfloat16 32x64 M = 1: broken ['wrong'] has a relative error of 1.0e+00" in outcome.wrong
    entries = json.loads(path.read_text())["entries"]
    assert entries["2:4"]["bf16"]["32x64"]["3"]["broken"][1:] == ["right"]
    assert pending(wanted, CPU, path) == []


@needs_native
@pytest.mark.usefixtures("gpu_in_name")
def test_a_stopped_tuning_run_keeps_what_it_measured(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    wanted = buckets([(32, 64)], [TWO_FOUR], [BF16], [1, 2, 4])

    def stop(bucket: Bucket, measured: object) -> None:
        if bucket.rows == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(wanted, CPU, path, seconds=0.01, report=stop)
    assert [bucket.rows for bucket in pending(wanted, CPU, path)] == [4]


@needs_native
@pytest.mark.usefixtures("gpu_in_name")
def test_the_gpu_suite_measures_what_dispatch_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite(shapes=((32, 64),), rows=(1, 3), patterns=("2:4", "unstructured"), dtypes=("bf16",))
    rows = list(linear_gpu.measure(suite, CPU))
    assert [(r["pattern"], r["m"], r["kernel"]) for r in rows] == [(p, m, "cpu") for p in suite.patterns for m in suite.rows]
    for measured in rows:
        assert wrong_field(measured) is None
        assert measured["rel_error"] < 1e-2
        assert measured["best_dense"] in ("linear", "addmm", "addmv")
        assert measured["cusparselt_us"] is None
    assert [r["m"] for r in linear_gpu.measure(suite, CPU, {key_of(r) for r in rows if r["m"] == 1})] == [3, 3]
    times = {"cpu": Measured(2.0), "dense": Measured(1.0)}
    monkeypatch.setattr(Problem, "measured", lambda self: times)
    assert {r["kernel"] for r in linear_gpu.measure(suite, CPU)} == {"dense"}
    notes: list[str] = []
    assert list(linear_gpu.measure(replace(suite, backend="cuda_nm"), CPU, note=notes.append)) == []
    assert len(notes) == 4


@pytest.mark.gpu
def test_tune_end_to_end_on_a_small_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    device, path = torch.device("cuda:0"), tuning.user_path(torch.cuda.get_device_name(0))
    wanted = buckets([(256, 512)], [TWO_FOUR, HALF], [BF16], [1, 16])
    outcome = tune(wanted, device, path, seconds=0.2)
    assert outcome.measured == len(wanted)
    assert outcome.wrong == []
    assert pending(wanted, device, path) == []
    for bucket in wanted:
        problem = bucket.problem(device)
        measured = problem.measured()
        able = {name for name, kernel in registry.all_kernels().items() if kernel.rejects(problem) is None} - {"reference"}
        assert measured.keys() == able
        assert all(m.source == tuning.USER and 0 < m.us < 1e4 for m in measured.values())
        best = min(measured, key=lambda name: measured[name].us)
        assert registry.explain(problem)[0].cost is not None
        assert best == "dense" or registry.explain(problem)[0].kernel == best


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [(1, 16), (256, 512)])
def test_bench_of_one_shape_on_a_gpu(counts: tuple[int, ...], tmp_path: Path) -> None:
    suite = Suite(shapes=((256, 512),), rows=counts, dtypes=("bf16",), budget=5.0)
    content = run.run(suite, torch.device("cuda"), tmp_path / "linear-decode.json")
    assert len(content["rows"]) == len(suite) == 6
    assert content["environment"]["max_sm_mhz"] >= content["environment"]["sm_mhz"][2] > 0
    for measured in content["rows"]:
        assert wrong_field(measured) is None
        assert measured["kernel"] != "reference"
        assert measured["rel_error"] < 1e-2
        assert 0 < measured["limit_us"] < 1e3
        assert measured["best_dense_us"] <= measured["dense_us"]
    assert run.read_results(tmp_path / "linear-decode.json") == content


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="8-bit kernels need Hopper")
def test_bench_of_quantised_values_on_a_gpu(tmp_path: Path) -> None:
    left_out: list[str] = []
    suite = Suite(shapes=((256, 512),), rows=(256,), patterns=("2:4", "4:8"), dtypes=("int8", "fp8"), budget=5.0)
    content = run.run(suite, torch.device("cuda"), tmp_path / "linear-prefill.json", note=left_out.append)
    assert [(measured["pattern"], measured["values"]) for measured in content["rows"]] == [("2:4", "int8"), ("2:4", "fp8")]
    assert len(left_out) == 2
    for measured in content["rows"]:
        assert measured["kernel"] == "cuda_nm_8bit"
        assert 0 < measured["of_levels_us"] < 1e3
        assert 1e-4 < measured["rel_error"] < 5e-2, "the activations were rounded to 8 bits"


def test_a_device_that_cannot_be_measured_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: "is missing")
    with pytest.raises(KernelUnavailableError, match="latency suite on cpu is missing"):
        run.run(replace(Suite(), shapes=((16, 64),)), CPU, tmp_path / "x.json")
