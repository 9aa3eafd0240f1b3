"""The study: recipes that are refused, stages that are made once, rows that merge, the report, and the shipped smoke recipe."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from checkpoints import TEXT, make_tiny_opt

from sparse_engine.errors import InputError, SparseEngineError
from sparse_engine.progress import silent
from sparse_engine.study import stages as stages_module
from sparse_engine.study.graph import Graph
from sparse_engine.study.parallel import _least_busy, _start, evaluate_apart, visible_gpus
from sparse_engine.study.plots import quality_plot, spread_out
from sparse_engine.study.recipe import Recipe, load_recipe, shipped_recipes
from sparse_engine.study.rows import table_line
from sparse_engine.study.run import run_study

_SMOKE_S = 360
"""Seconds that the whole smoke study may take on two cores; some 50 is usual."""

RECIPE = """
name: tiny
models:
  tiny: {checkpoint: "${TINY}/model", dense: full}
data:
  train: {source: "${TINY}/bills.jsonl"}
  heldout: {source: "${TINY}/bills.jsonl", limit: 3}
  validation: {source: ["${TINY}/bills.jsonl", "${TINY}/bills.jsonl"], limit: 9}
  test: {source: "${TINY}/bills.jsonl", limit: 4}
calibration: {source: train, samples: 4, length: 64, prompts: true}
finetune: {max_steps: 3, batch_size: 4, max_text_tokens: 40, rank: 2}
evaluate: {batch_size: 4, max_text_tokens: 40, max_new_tokens: 8, decode_tokens: 3}
score: {metrics: [rouge, coherence, extractive]}
examples: 2
rows:
  - {id: base, model: tiny}
  - id: full
    model: tiny
    technique: full
    steps: [finetune: {method: full}]
    published: {test_rougeL: 0.4239, seconds: 262.3, nonzero: 125239296, size_mb: 955.54}
  - id: recovered
    model: tiny
    start: full
    technique: sparse-full
    pruning: Wanda
    sparsity: "2:4"
    steps:
      - prune: {pruner: wanda, pattern: "2:4"}
      - finetune: {method: sparse-full, teacher: full}
  - id: merged
    model: tiny
    start: full
    technique: sparse-lora
    pruning: Wanda
    sparsity: "2:4"
    steps:
      - prune: {pruner: wanda, pattern: "2:4"}
      - finetune: {method: sparse-lora}
      - merge: {}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study")
    make_tiny_opt(path / "model", max_position_embeddings=512)
    rows = [
        {"text": f"Bill {i}. {TEXT[: 30 + 9 * i]}", "summary": f"Repairs <{i}> bridges & roads.", "title": f"Bill {i}"} for i in range(8)
    ]
    (path / "bills.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "tiny.yaml").write_text(RECIPE)
    return path


@pytest.fixture
def recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("TINY", str(folder))
    return load_recipe(str(folder / "tiny.yaml"))


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """The whole tiny study, run once."""
    os.environ["TINY"] = str(folder)
    out = folder / "out"
    run_study(load_recipe(str(folder / "tiny.yaml")), out, command="sparse-engine study tiny")
    return out


def _lines(out: Path) -> dict[str, dict[str, object]]:
    return {row["id"]: row for row in json.loads((out / "study.json").read_text())["rows"]}


def test_shipped_recipes_have_the_published_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert set(shipped_recipes()) == {"offline-28m", "opt-125m-350m", "smoke"}
    monkeypatch.setenv("SPARSE_ENGINE_DATA", str(tmp_path))
    published = load_recipe("opt-125m-350m")
    with_figures = [row for row in published.rows.values() if row.published]
    assert len(with_figures) == 14
    assert all(len(row.published) == 7 for row in with_figures)
    assert published.rows["opt-125m-full"].published["test_rougeL"] == 0.4239
    assert published.rows["opt-350m-sparsegpt-2of4-qlora"].published["seconds"] == 2271.95
    # The same steps in the same order, on two local models in the place of the two from the Hub.
    shape = [[(step.kind, step.settings.get("method"), step.settings.get("pattern")) for step in row.steps] for row in with_figures]
    local = [row for row in load_recipe("offline-28m").rows.values() if "tuned" not in row.id and "long" not in row.id]
    assert [[(s.kind, s.settings.get("method"), s.settings.get("pattern")) for s in row.steps] for row in local] == shape
    qlora = next(step.settings for row in with_figures for step in row.steps if step.settings.get("method") == "qlora")
    wanted = {"bits": 8, "rank": 16, "alpha": 32, "lora_dropout": 0.05, "epochs": 3.0, "learning_rate": 2e-4}
    assert wanted.items() <= qlora.items()
    assert qlora["targets"] == ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank: 2}", "rnk: 2}", "fine-tuning has no setting 'rnk'"),
        ("name: tiny\n", "name: tiny\ncolour: red\n", "the recipe has the unknown key 'colour'"),
        ("start: full", "start: later", "builds on the row 'later', which must come before it"),
        ("dense: full", "dense: fool", "names the row 'fool' as its dense reference"),
        ("id: merged", "id: full", "row full is there twice"),
        ("pruner: wanda", "pruner: wonder", "wonder"),
        ("2:4", "2:3", "N:M needs M in"),
        ("${TINY}/model", "${NOWHERE}/model", "the environment variable NOWHERE is not set"),
        ("rows:", "rows: [", "is no YAML"),
        ("name: tiny\n", "name: tiny\nseed: many\n", "the recipe: seed must be a whole number from 0 on, got 'many'"),
        ("samples: 4", "samples: four", "calibration: samples must be a whole number above 0, got 'four'"),
        ("prompts: true", "prompts: 1", "calibration: prompts must be true or false, got 1"),
        ("max_new_tokens: 8", "max_new_tokens: 0", "row base, evaluate: max_new_tokens must be a whole number above 0, got 0"),
        ("decode_tokens: 3", "dtype: half", "unknown --dtype 'half'"),
        ("decode_tokens: 3", "backend: fast", "unknown backend 'fast'"),
        ("limit: 4", "limit: true", "data, test: limit must be a whole number above 0, got True"),
        ("metrics: [rouge", "metrics: [rogue", "there is no metric 'rogue'"),
        ("test_rougeL: 0.4239", "test_rougeL: high", "row full, published: test_rougeL must be a number, got 'high'"),
        ('pattern: "2:4"', "pattern: 2:4", 'a pattern such as "2:4" stands in quotes'),
        ("  test:", "  tost:", "data has the unknown key 'tost'"),
        ("model: tiny\n    technique: full", "model: tinier\n    technique: full", "unknown model 'tinier'"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    monkeypatch.setenv("TINY", str(tmp_path))
    assert old in RECIPE
    (tmp_path / "bad.yaml").write_text(RECIPE.replace(old, new))
    with pytest.raises(InputError, match=re.escape(message)):
        load_recipe(str(tmp_path / "bad.yaml"))


def test_damaged_results_are_named(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "full.json").write_text("{")
    with pytest.raises(InputError, match=r"full\.json is damaged \(.*\); remove it and run again"):
        run_study(recipe, tmp_path, report_only=True)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(InputError, match=r"latin\.yaml is no UTF-8 text"):
        load_recipe(str(tmp_path / "latin.yaml"))


def test_unknown_recipes_and_rows_are_named(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no recipe smok: give a file, or one of offline-28m, opt-125m-350m, smoke"):
        load_recipe("smok")
    with pytest.raises(InputError, match="no row 'fall': it has base, full, recovered, merged"):
        run_study(recipe, tmp_path, rows=["fall"])
    with pytest.raises(InputError, match="no row of the recipe is finished yet"):
        run_study(recipe, tmp_path, report_only=True)


def test_keys_follow_contents_and_settings_not_places(
    recipe: Recipe, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys() -> dict[str, str]:
        found = load_recipe(str(folder / "tiny.yaml"))
        return {name: Graph(found, "cpu").scores(row).key for name, row in found.rows.items()}

    before = keys()
    assert len(set(before.values())) == 4
    for name in ("model", "bills.jsonl"):
        (shutil.copytree if (folder / name).is_dir() else shutil.copyfile)(folder / name, tmp_path / name)
    monkeypatch.setenv("TINY", str(tmp_path))
    assert keys() == before
    lines = (tmp_path / "bills.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "bills.jsonl").write_text("".join([lines[0].replace("Repairs", "Paints"), *lines[1:]]))
    assert not set(keys().values()) & set(before.values())
    graph, other = Graph(recipe, "cpu"), Graph(recipe, "cuda")
    assert graph.checkpoint(recipe.rows["recovered"]).key == other.checkpoint(recipe.rows["recovered"]).key
    assert graph.evaluation(recipe.rows["recovered"]).key != other.evaluation(recipe.rows["recovered"]).key


def test_the_table_has_every_row_with_its_published_figures(finished: Path) -> None:
    lines = _lines(finished)
    assert list(lines) == ["base", "full", "recovered", "merged"]
    full, recovered = lines["full"], lines["recovered"]
    assert full["test_rougeL_published"] == 0.4239
    assert full["speedup_batch_1"] == full["speedup_batch_4"] == full["size_ratio"] == full["likelihood_recovery"] == 1
    assert recovered["engine"] == lines["merged"]["engine"] == "packed"
    assert recovered["size_ratio"] < 1
    assert recovered["nonzero"] < full["nonzero"] == full["parameters"]
    assert recovered["likelihood_recovery_low"] <= recovered["likelihood_recovery"] <= recovered["likelihood_recovery_high"]
    assert recovered["speedup_batch_1"] == pytest.approx(full["token_ms_batch_1"] / recovered["token_ms_batch_1"])
    assert all(line["test_bertscore"] is None for line in lines.values())
    table = list(csv.DictReader((finished / "table.csv").open()))
    assert [row["id"] for row in table] == list(lines)
    assert float(table[2]["test_rougeL"]) == recovered["test_rougeL"]
    text = (finished / "table.md").read_text()
    assert "[0.4239]" in text
    assert "[125,239,296]" in text


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_by_itself(finished: Path) -> None:
    page = _Page()
    page.feed((finished / "report.html").read_text())
    assert page.tags.count("svg") == 2
    # Markers inside the drawings refer to the page itself; nothing is loaded from elsewhere.
    assert all(link.startswith("#") for link in page.links)
    assert "script" not in page.tags
    assert "Repairs <0> bridges & roads." in page.text
    assert page.text.count("reference") >= 4
    for wanted in ("recovered", 'checkpoint: "${TINY}/model"', "transformers", "sparse-engine study tiny"):
        assert wanted in page.text


def test_a_finished_study_runs_nothing_again(recipe: Recipe, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a stage was made again")

    for step in ("_prune", "_finetune", "_merge", "_evaluate", "_score"):
        monkeypatch.setattr(stages_module.Stages, step, never)
    before = (finished / "study.json").read_text()
    run_study(recipe, finished, command="sparse-engine study tiny")
    assert json.loads((finished / "study.json").read_text())["rows"] == json.loads(before)["rows"]


def test_rows_share_the_stages_that_they_have_in_common(finished: Path) -> None:
    kinds = [path.name.partition("-")[0] for path in (finished / "stages").iterdir()]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"finetune": 3, "prune": 1, "merge": 1, "evaluate": 4, "score": 4}
    assert not list((finished / "stages").glob("*.building"))


def test_rows_run_apart_and_elsewhere_merge_into_one_report(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    # One place has the weights and generates; another gets everything but the weights, scores, and adds its own rows.
    here, there = tmp_path / "here", tmp_path / "there"
    assert run_study(recipe, here, rows=["recovered"], score=False) == []
    shutil.copytree(here, there, ignore=shutil.ignore_patterns("*.safetensors", "checkpoint"))
    run_study(recipe, there, score_only=True)
    assert list(_lines(there)) == ["recovered"]
    assert "Rows not run yet: base, full, merged." in (there / "table.md").read_text()
    shutil.copyfile(finished / "rows" / "full.json", there / "rows" / "full.json")
    run_study(recipe, there, report_only=True)
    merged = _lines(there)
    assert list(merged) == ["full", "recovered"]
    assert merged["recovered"]["test_rougeL"] == _lines(finished)["recovered"]["test_rougeL"]
    assert merged["recovered"]["speedup_batch_1"] > 0


def test_a_row_may_be_stored_otherwise(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    row = "\n  - {id: %s, model: tiny, start: recovered, steps: [store: %s]}"
    added = row % ("int8", "{values: int8, lm_head: int8}") + row % ("masked", "{format: dense}")
    (tmp_path / "more.yaml").write_text(RECIPE.rstrip() + added)
    shutil.copytree(finished, tmp_path / "out")
    run_study(load_recipe(str(tmp_path / "more.yaml")), tmp_path / "out", rows=["int8", "masked"])
    lines = _lines(tmp_path / "out")
    assert [lines[name]["engine"] for name in ("recovered", "int8", "masked")] == ["packed", "packed", "dense"]
    assert lines["int8"]["size_mb"] < lines["recovered"]["size_mb"] < lines["masked"]["size_mb"]
    assert lines["masked"]["nonzero"] == lines["recovered"]["nonzero"]
    # The masked dense weights are the packed ones.
    assert lines["masked"]["test_answer_ppl"] == pytest.approx(lines["recovered"]["test_answer_ppl"], rel=1e-4)
    assert lines["int8"]["test_answer_ppl"] != lines["recovered"]["test_answer_ppl"]
    for settings, message in (("{values: int3}", "int8"), ("{format: zip}", "zip"), ("{pattern: x}", "unknown key 'pattern'")):
        (tmp_path / "bad.yaml").write_text(RECIPE.rstrip() + row % ("bad", settings))
        with pytest.raises(InputError, match=message):
            load_recipe(str(tmp_path / "bad.yaml"))


def test_an_interrupted_stage_is_taken_up(recipe: Recipe, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stopping(items, description, total):
        for done, item in enumerate(items):
            if description.startswith("fine-tuning") and done == 2:
                raise Stop
            yield item

    with pytest.raises(Stop):
        run_study(recipe, tmp_path, rows=["full"], track=stopping)
    (building,) = (tmp_path / "stages").glob("finetune-*.building")
    assert (building / "checkpoint.partial" / "checkpoint-1").is_dir()
    run_study(recipe, tmp_path, rows=["full"])
    assert not list((tmp_path / "stages").glob("*.building"))


def test_no_speed_up_is_claimed_over_another_machine(finished: Path) -> None:
    result, dense = (json.loads((finished / "rows" / f"{name}.json").read_text()) for name in ("recovered", "full"))
    dense["cost"]["device"] = "NVIDIA H200"
    line = table_line(result, dense)
    assert line["speedup_batch_1"] is None
    assert 0 < line["likelihood_recovery"] < 2
    assert table_line(result, None)["size_ratio"] is None


def test_fine_tuning_spreads_over_processes(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    run_study(recipe, tmp_path, rows=["full"], processes=2)
    (record,) = (tmp_path / "stages").glob("finetune-*/record.json")
    found = json.loads(record.read_text())["result"]
    assert found["steps"] == 3
    assert found["validation_loss"] > 0


def test_stages_run_several_at_a_time(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    run_study(recipe, tmp_path, rows=["recovered", "merged"], jobs=2, source=str(folder / "tiny.yaml"))
    lines = _lines(tmp_path)
    assert list(lines) == ["recovered", "merged"]
    assert lines["recovered"]["speedup_batch_1"] is None  # its dense row was not asked for
    made = {path.stem.partition("-")[0] for path in (tmp_path / "stages").glob("*.log")}
    assert made == {"finetune", "prune", "merge"}


def test_a_failed_stage_names_its_reason_and_holds_up_no_other_row(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(RECIPE.replace("max_steps: 3", "max_steps: 4"))
    with pytest.raises(SparseEngineError, match=r"finetune-.* failed with exit code 2: sparse-engine: the recipe has no stage finetune-"):
        run_study(recipe, tmp_path / "out", rows=["base", "recovered"], jobs=2, source=str(broken), score=False)
    assert len(list((tmp_path / "out" / "stages").glob("evaluate-*/record.json"))) == 1
    with pytest.raises(InputError, match="use one of the two"):
        run_study(recipe, tmp_path / "out", rows=["full"], jobs=2, processes=2)


def test_jobs_go_to_the_least_busy_gpu_and_see_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(torch.device("cpu")) == []
    assert visible_gpus(torch.device("cuda")) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8f")
    gpus = visible_gpus(torch.device("cuda"))
    assert gpus == ["3", "GPU-8f"]
    assert [_least_busy(gpus, busy) for busy in ([], ["3"], ["3", "GPU-8f", "GPU-8f"])] == ["3", "GPU-8f", "3"]
    assert _least_busy([], []) is None
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho $CUDA_VISIBLE_DEVICES $*\n")
    (tmp_path / "python").chmod(0o755)
    assert _start(["stage", "x"], tmp_path / "log", "GPU-8f", 2).wait() == 0
    assert (tmp_path / "log").read_text() == "GPU-8f -m sparse_engine.study stage x\n"


def test_each_gpu_evaluates_its_share(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    stages = stages_module.Stages(Graph(recipe, "cpu"), tmp_path / "stages", torch.device("cpu"), 1, silent)
    stages.folder.mkdir()
    evaluate_apart(stages, ["base"], str(folder / "tiny.yaml"), ["0", "1"])
    assert stages.has(stages.graph.evaluation(recipe.rows["base"]))
    assert [log.name for log in stages.folder.glob("*.log")] == ["evaluate-0.log"]
    with pytest.raises(SparseEngineError, match="evaluating on GPU 1 failed with exit code 2: sparse-engine: there is no recipe nowhere"):
        evaluate_apart(stages, ["base", "full"], "nowhere", ["1", "0"])


def test_the_smoke_recipe_runs_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sparse_engine", "study", "smoke", "--device", "cpu", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=_SMOKE_S)
    assert done.returncode == 0, done.stderr
    lines = _lines(tmp_path / "out")
    assert list(lines) == list(load_recipe("smoke").rows)
    assert [lines[name]["engine"] for name in ("full", "qlora", "sparsegpt-2of4-recovered")] == ["dense", "adapter on 8-bit", "packed"]
    # Fine-tuned or recovered on the very bills it is asked about, the summariser writes summaries of them.
    assert lines["full"]["test_rougeL"] > 0.5
    assert lines["sparsegpt-2of4-recovered"]["test_rougeL"] > 0.4 > lines["wanda-2of4-qlora"]["test_rougeL"]
    assert done.stdout.split() == [f"out/{name}" for name in ("table.md", "table.csv", "study.json", "report.html")]


def test_a_colour_means_the_same_in_every_plot() -> None:
    def row(name: str, pruning: str, speed: float | None, size: float) -> dict[str, object]:
        quality = {"test_rougeL": 0.3, "test_rougeL_low": 0.2, "test_rougeL_high": 0.4}
        return {"id": name, "technique": "full", "pruning": pruning, "sparsity": "2:4", "speed": speed, "size": size, **quality}

    # The first row has no speed, so that the other is the first in one plot and the second in the other.
    lines = [row("a", "Wanda", None, 5.0), row("b", "SparseGPT", 2.0, 3.0)]
    speed, size = (quality_plot(lines, x, x) for x in ("speed", "size"))
    assert speed is not None
    assert size is not None
    assert "Wanda 2:4" not in speed
    first, second = "#1f77b4", "#ff7f0e"
    assert [colour in speed for colour in (first, second)] == [False, True]
    assert [colour in size for colour in (first, second)] == [True, True]


def test_names_beside_a_plot_keep_their_distance() -> None:
    wanted = [0.5, 0.51, 0.5, 0.99, 1.0, 0.02]
    placed = spread_out(wanted, 0.1)
    in_order = sorted(placed)
    assert all(b - a > 0.0999 for a, b in itertools.pairwise(in_order))
    assert in_order[0] >= 0
    assert in_order[-1] <= 1
    assert placed[5] == 0.02
    assert placed[5] < placed[0] < placed[1] < placed[3] < placed[4]
