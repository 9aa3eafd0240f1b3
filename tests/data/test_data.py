"""Readers, calibration windows and the prompt: what they give, and the one sentence each bad input gets."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import sys
from pathlib import Path

import pytest
import torch
import zstandard
from transformers import AutoTokenizer

from sparse_engine.data import build_prompt, calibration_tokens, extract_summary, prompt_tokens, read_documents, read_rows, render_example
from sparse_engine.data.calibration import windows
from sparse_engine.data.prompt import truncate
from sparse_engine.errors import InputError

BILL = "SECTION 1. SHORT TITLE. This Act may be cited as the Bridge Repair Act. "


@pytest.fixture(scope="module")
def tokenizer(tiny_opt: Path):
    return AutoTokenizer.from_pretrained(tiny_opt)


def _rng() -> random.Random:
    return random.Random(0)  # noqa: S311 (sampling, not secrets)


def _jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_rows_are_the_same_however_compressed(tmp_path: Path, suffix: str) -> None:
    data = _jsonl({"text": "a bill – with a dash", "summary": "s"}, {"text": "another"})
    if suffix == ".gz":
        data = gzip.compress(data)
    elif suffix == ".zst":
        # A window beyond the library's own limit, as `zstd --long=27` writes.
        parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, enable_ldm=True)
        data = zstandard.ZstdCompressor(compression_params=parameters).compress(data)
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(data)
    assert read_rows(path).rows == [{"text": "a bill – with a dash", "summary": "s"}, {"text": "another"}]


def test_rows_without_text_are_counted_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(_jsonl({"text": "kept"}, {"title": "no text"}, {"text": "  "}, {"text": 3}))
    found = read_rows(path)
    assert [row["text"] for row in found.rows] == ["kept"]
    assert found.skipped == 3
    assert "3 of 4 rows have no `text`" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("list.jsonl", b'["text"]\n', "line 1 is a JSON list"),
        ("empty.jsonl", b"", "no usable rows: none of its 0 rows"),
        ("other.jsonl", b'{"body": "a"}\n', "no usable rows: none of its 1 rows"),
        ("latin.jsonl", b'{"text": "\xe9"}\n', "is not UTF-8"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], "is not a whole .gz file"),
        ("not.jsonl.gz", b"plain", "is not a whole .gz file"),
        ("not.jsonl.zst", b"plain", "is not a whole .zst file"),
        ("blank.txt", b" \n", "is empty"),
        ("table.csv", b"text\na\n", "expected .txt or .jsonl"),
    ],
)
def test_bad_files_are_named_with_what_is_wrong(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=name) as caught:
        read_documents(path)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jsonl: No such file"):
        read_documents(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match=r"absent\.parquet"):
        read_documents(tmp_path / "absent.parquet")


def test_parquet_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow, which comes with datasets")
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow, which comes with datasets")
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "summary": ["1", "2"]}), tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet").rows == [{"text": "one", "summary": "1"}, {"text": "two", "summary": "2"}]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match=r"bad\.parquet is not a readable Parquet file"):
        read_rows(tmp_path / "bad.parquet")


def test_windows_are_seeded_and_lie_inside_their_documents(tmp_path: Path, tokenizer) -> None:
    texts = [f"Bill number {i}. " + BILL * (3 + i) for i in range(20)]
    path = tmp_path / "bills.jsonl"
    path.write_bytes(_jsonl(*({"text": text} for text in texts)))
    first = calibration_tokens(str(path), tokenizer, samples=8, length=48, seed=3)
    again = calibration_tokens(str(path), tokenizer, samples=8, length=48, seed=3)
    other = calibration_tokens(str(path), tokenizer, samples=8, length=48, seed=4)
    assert len(first) == 8
    assert all(window.shape == (48,) and window.dtype == torch.int64 for window in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for window in first:
        ids = window.tolist()
        assert any(ids == document[at : at + 48] for document in documents for at in range(len(document) - 47))


def test_one_long_document_gives_windows_that_do_not_overlap(tokenizer) -> None:
    numbers = " ".join(str(i) for i in range(400))
    ids = tokenizer(numbers, add_special_tokens=False)["input_ids"]
    found = windows([numbers], tokenizer, samples=len(ids) // 32, length=32, rng=_rng())
    assert len(found) == len(ids) // 32
    starts = sorted(next(at for at in range(len(ids)) if ids[at : at + 32] == window.tolist()) for window in found)
    assert all(b - a >= 32 for a, b in itertools.pairwise(starts))


def test_short_documents_are_joined_by_the_end_token(tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    ids = tokenizer("Bridge", add_special_tokens=False)["input_ids"]
    found = windows(["Bridge"] * 10, tokenizer, samples=99, length=len(ids) + 1, rng=_rng())
    assert [window.tolist() for window in found] == [[*ids, tokenizer.eos_token_id]] * 10
    assert "10 calibration windows" in caplog.text


def test_too_little_text_is_refused(tokenizer) -> None:
    with pytest.raises(InputError, match="fewer than one calibration window of 100"):
        windows(["Bridge"], tokenizer, samples=4, length=100, rng=_rng())
    with pytest.raises(InputError, match="at least 1 sample"):
        calibration_tokens("any.txt", tokenizer, samples=0, length=8)


def test_prompts_as_calibration_need_summaries(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "bills.jsonl"
    path.write_bytes(_jsonl({"text": BILL, "summary": "Repairs bridges."}))
    window = calibration_tokens(str(path), tokenizer, samples=1, length=120, as_prompts=True)[0]
    whole = render_example(BILL, "Repairs bridges.", tokenizer)
    assert tokenizer.decode(window) in whole
    path.write_bytes(_jsonl({"text": BILL}))
    with pytest.raises(InputError, match="`summary` beside the `text`"):
        calibration_tokens(str(path), tokenizer, samples=1, length=120, as_prompts=True)


def test_an_unreachable_hub_source_says_to_pass_a_file(monkeypatch: pytest.MonkeyPatch, tokenizer) -> None:
    class Offline:
        @staticmethod
        def load_dataset(*args: object, **kwargs: object) -> object:
            raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", Offline)
    with pytest.raises(InputError, match=r"cannot reach allenai/c4 .* pass a \.txt"):
        calibration_tokens("c4", tokenizer, samples=1, length=8)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the datasets package .* pass a \.txt"):
        calibration_tokens("billsum", tokenizer, samples=1, length=8)


def test_the_prompt_is_the_study_s_to_the_letter(tokenizer) -> None:
    assert render_example("The text.", "The summary.", tokenizer) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruct: Summarize the text below.\n"
        "\n"
        "The text.\n"
        "\n"
        "### Output:\n"
        "\n"
        "The summary.\n"
        "\n"
        "### End"
    )


@pytest.mark.parametrize("limit", [1, 7, 50])
def test_truncation_counts_the_text_s_tokens_and_keeps_the_end(tokenizer, limit: int) -> None:
    text = BILL * 20
    cut = truncate(text, tokenizer, limit)
    assert text.startswith(cut)
    assert len(tokenizer(cut, add_special_tokens=False)["input_ids"]) == limit
    assert build_prompt(text, tokenizer, limit).endswith(cut + "\n\n### Output:\n\n")


def test_prompt_tokens_are_those_of_the_whole_example(tokenizer) -> None:
    ids = prompt_tokens(BILL, tokenizer)
    whole = tokenizer(render_example(BILL, "Repairs bridges.", tokenizer))["input_ids"]
    assert whole[: len(ids)] == ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids).endswith("### Output:\n\n")


@pytest.mark.parametrize("room", [150, 200, 333])
def test_a_bound_on_the_prompt_cuts_text_only(tokenizer, room: int) -> None:
    ids = prompt_tokens(BILL * 50, tokenizer, max_length=room)
    assert room - 3 <= len(ids) <= room
    assert tokenizer.decode(ids).endswith("### Output:\n\n")
    with pytest.raises(InputError, match="no room for text"):
        prompt_tokens(BILL, tokenizer, max_length=20)


@pytest.mark.parametrize(
    ("generated", "summary"),
    [
        ("A summary.\n\n### End", "A summary."),
        ("### Output:\n\nA summary.\n\n### End\n\n### End", "A summary."),
        ("cut off in the mid", "cut off in the mid"),
        ("\n\n### End", ""),
    ],
)
def test_extract_summary(generated: str, summary: str) -> None:
    assert extract_summary(generated) == summary


def test_real_files_load(data_dir: Path) -> None:
    rows = read_rows(data_dir / "data" / "billsum_real100.jsonl.zst")
    assert len(rows.rows) == 100
    assert all(row["summary"] for row in rows.rows)
    wikitext = read_documents(data_dir / "data" / "wikitext2" / "test_joined.txt.zst")
    assert len(wikitext) == 1
