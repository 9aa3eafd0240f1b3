"""finetune, merge, eval and score from the command line: a pruned model trained, merged and measured, and refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import TEXT, make_tiny_opt


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_opt(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=512)


@pytest.fixture
def bills(tmp_path: Path) -> Path:
    path = tmp_path / "bills.jsonl"
    rows = [{"body": f"Bill {i}. {TEXT[: 40 + i]}", "summary": f"Repairs {i} bridges."} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_pruned_model_is_trained_merged_and_measured(cli, model: Path, bills: Path) -> None:
    assert cli("convert", model, "--nm", "2:4", "--out", "pruned").code == 0
    columns = ("--text-column", "body")
    short = ("--max-steps", 2, "--batch-size", 3, "--max-text-tokens", 40, "--train", bills, "--validation", bills, *columns)
    trained = cli("finetune", "pruned", "--method", "sparse-lora", *short)
    assert trained.code == 0, trained.err
    assert "2 steps on 6 examples" in trained.out
    assert "written to pruned-sparse-lora" in trained.out
    assert "fine-tuning (sparse-lora): 2/2" in trained.err
    merged = cli("merge", "pruned-sparse-lora")
    assert merged.code == 0, merged.err
    assert "10 linears merged, 12 of the model's linears under a mask" in merged.out
    assert cli("inspect", "pruned-sparse-lora-merged", "--verify").code == 0
    common = ("--data", bills, *columns, "--out", "scores", "--max-new-tokens", 8, "--max-text-tokens", 40, "--limit", 3)
    made = cli("eval", "pruned-sparse-lora-merged", *common, "--no-score", "--perplexity", _text(bills))
    assert made.code == 0, made.err
    assert "3 summaries in" in made.out
    assert json.loads(Path("scores/perplexity.json").read_text())["perplexity"] > 1
    assert not Path("scores/scores.json").exists()
    scored = cli("score", "scores", "--metrics", "rouge,coherence")
    assert scored.code == 0, scored.err
    assert "rougeL" in scored.out
    assert "repeated_4grams" in scored.out
    beside = [str(value).replace("scores", "beside") for value in common]
    adapted = cli("eval", "pruned-sparse-lora", *beside, "--metrics", "rouge")
    assert adapted.code == 0, adapted.err
    assert "on cpu, adapter" in adapted.out
    texts = [
        [json.loads(line)["prediction"] for line in Path(f, "predictions.jsonl").read_text().splitlines()] for f in ("scores", "beside")
    ]
    assert texts[0] == texts[1]


def _text(bills: Path) -> Path:
    path = bills.with_name("long.txt")
    path.write_text(TEXT * 20)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("finetune", "{model}", "--method", "sparse-full", "--train", "{bills}", "--validation", "{bills}", "--text-column", "body"),
         "is dense, and --method sparse-full trains under a mask"),
        (("finetune", "{model}", "--method", "full", "--train", "{bills}"), "--validation names the held-out examples"),
        (("finetune", "{model}", "--method", "full", "--train", "{bills}", "--validation", "{bills}"),
         "has no column 'text'; it has body, summary"),
        (("finetune", "{model}", "--method", "fool"), "method 'fool' is unknown"),
        (("merge", "{model}"), "is no adapter"),
        (("eval", "{model}", "--data", "{bills}", "--out", "o", "--metrics", "bleu"), "no metric 'bleu'"),
        (("score", "nowhere"), "generate first"),
        (("study", "nothing"), "there is no recipe nothing"),
        (("study", "smoke", "--rows", ","), "--rows is empty"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_met_is_one_line(cli, model: Path, bills: Path, arguments: tuple[str, ...], message: str) -> None:
    done = cli(*(argument.format(model=model, bills=bills) for argument in arguments))
    assert done.code == 2
    assert message in done.err
    assert done.err.count("sparse-engine: ") == 1
    assert "Traceback" not in done.err
    assert [path.name for path in Path().iterdir()] == ["bills.jsonl"]


@pytest.mark.parametrize("command", ["finetune", "merge", "eval", "score", "study"])
def test_every_command_has_help_with_an_example(cli, command: str) -> None:
    done = cli(command, "--help")
    assert done.code == 0
    assert "Example: sparse-engine" in done.out


def test_the_rows_of_a_recipe_are_listed(cli) -> None:
    done = cli("study", "smoke", "--list")
    assert done.code == 0
    assert "sparsegpt-2of4-recovered: summ-7m from full, prune, finetune" in done.out
