"""Example pairs from files and from BillSum's layout, their training ids, and batches whose answers alone carry labels."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, OPTForCausalLM

from sparse_engine.data import AnswerCollator, Pair, build_prompt, encode_pair, encode_pairs, load_pairs
from sparse_engine.data.encode import IGNORED
from sparse_engine.data.prompt import windows
from sparse_engine.demo.embedded import CHECKPOINT, bills
from sparse_engine.errors import InputError


def _write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return [Pair(str(i), row["text"], row["summary"]) for i, row in enumerate(bills().rows)]


def test_billsum_is_split_as_in_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The repository's own layout on the local disk: three splits, of which the California one is called ca_test.
    head = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    sizes = {"train": 5200, "test": 130, "ca_test": 110}
    for split, size in sizes.items():
        _write(tmp_path / f"{split}.jsonl", [{"text": f"{split} bill {i}", "summary": "s", "title": f"t{i}"} for i in range(size)])
        head += f"  - split: {split}\n    path: {split}.jsonl\n"
    (tmp_path / "README.md").write_text(head + "---\n")
    monkeypatch.setattr("sparse_engine.data.pairs.BILLSUM", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = {split: load_pairs("billsum", split) for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in found.items()} == {"train": 5000, "validation": 100, "test": 100}
    assert all(pair.text.startswith("ca_test bill") for pair in found["validation"])
    assert all(pair.text.startswith("test bill") for pair in found["test"])
    assert found["test"] == load_pairs("billsum", "test", seed=0)
    assert found["test"] != load_pairs("billsum", "test", seed=1)
    with pytest.raises(InputError, match="no split 'dev'"):
        load_pairs("billsum", "dev")


def test_billsum_without_the_package_or_the_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sparse_engine.data.pairs.BILLSUM", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"cannot reach .*nowhere.*pass a local"):
        load_pairs("billsum", "test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="needs the datasets package"):
        load_pairs("billsum", "test")


def test_rows_without_text_or_summary_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "a", "summary": "s", "bill_id": "hr1"}, {"text": "", "summary": "s"}, {"text": "b", "summary": " "}, {"text": "c"}]
    found = load_pairs(str(_write(tmp_path / "rows.jsonl", rows)))
    assert found == [Pair("hr1", "a", "s")]
    assert "left out 1 rows without text and 2 without a summary" in caplog.text


def test_wrong_columns_are_named_with_those_that_are_there(tmp_path: Path) -> None:
    path = str(_write(tmp_path / "rows.jsonl", [{"body": "a bill", "abstract": "short"}]))
    with pytest.raises(InputError, match="no column 'text' and no column 'summary'; it has abstract, body"):
        load_pairs(path)
    assert load_pairs(path, text_column="body", summary_column="abstract") == [Pair("1", "a bill", "short")]


def test_no_usable_row_is_an_error(tmp_path: Path) -> None:
    path = str(_write(tmp_path / "rows.jsonl", [{"text": "a", "summary": ""}] * 3))
    with pytest.raises(InputError, match="of 3 rows 0 have an empty 'text' and 3 an empty 'summary'"):
        load_pairs(path)


def test_a_limit_takes_a_seeded_choice_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = str(_write(tmp_path / "rows.jsonl", [{"text": f"{i:03}", "summary": "s"} for i in range(50)]))
    chosen = [pair.text for pair in load_pairs(path, limit=10, seed=3)]
    assert len(chosen) == 10
    assert chosen == sorted(chosen)
    assert chosen == [pair.text for pair in load_pairs(path, limit=10, seed=3)]
    assert chosen != [pair.text for pair in load_pairs(path, limit=10, seed=4)]
    with pytest.raises(InputError, match="give at least 1"):
        load_pairs(path, limit=0)


def test_an_example_is_the_whole_prompt_encoded_at_once(tokenizer, pairs: list[Pair]) -> None:
    for pair in pairs:
        found = encode_pair(pair, tokenizer, positions=2048)
        whole = f"{build_prompt(pair.text, tokenizer)}{pair.summary.strip()}\n\n### End"
        assert found["input_ids"] == [*tokenizer(whole)["input_ids"], tokenizer.eos_token_id]
        answer = tokenizer.decode(found["input_ids"][found["answer"] :])
        assert answer == f"{pair.summary.strip()}\n\n### End{tokenizer.eos_token}"


def test_an_over_long_bill_loses_text_but_never_the_frame(tokenizer, pairs: list[Pair]) -> None:
    long = Pair("long", "A bill to repair bridges. " * 3000, "Repairs bridges. " * 100)
    found = encode_pair(long, tokenizer, positions=256, max_summary_tokens=20)
    text = tokenizer.decode(found["input_ids"])
    assert len(found["input_ids"]) <= 256
    assert "### Output:\n\nRepairs bridges." in text
    assert text.endswith(f"### End{tokenizer.eos_token}")
    with pytest.raises(InputError, match="no room in 30 positions"):
        encode_pair(long, tokenizer, positions=30)


@pytest.mark.parametrize("all_positions", [False, True])
def test_a_batch_gives_the_loss_of_each_answer_by_itself(tokenizer, pairs: list[Pair], all_positions: bool) -> None:
    model = OPTForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    encoded = encode_pairs(pairs[:3], tokenizer, positions=2048, max_text_tokens=120)
    batch = AnswerCollator(model.config.pad_token_id, all_positions)(encoded)
    assert len({len(e["input_ids"]) for e in encoded}) > 1
    with torch.inference_mode():
        logits = model(input_ids=batch["input_ids"], logits_to_keep=batch["logits_to_keep"]).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none", ignore_index=IGNORED).sum(1)
        for example, loss in zip(encoded, losses, strict=True):
            ids, answer = torch.tensor(example["input_ids"]), example["answer"]
            alone = model(input_ids=ids[None]).logits[0]
            torch.testing.assert_close(loss, F.cross_entropy(alone[answer - 1 : -1], ids[answer:], reduction="sum"), rtol=1e-4, atol=1e-3)
    # The first column never carries a label, so that Trainer counts the same labels whether or not it shifts them.
    assert (batch["labels"][:, 0] == IGNORED).all()
    assert int((batch["labels"] != IGNORED).sum()) == sum(len(e["input_ids"]) - e["answer"] for e in encoded)


def test_real_billsum_rows_load(data_dir: Path) -> None:
    found = load_pairs(str(data_dir / "data" / "billsum_real100.jsonl.zst"))
    assert len(found) == 100
    assert all(pair.text.strip() and pair.summary.strip() for pair in found)


def test_windows_are_the_whole_text_in_pieces_and_each_an_example(tokenizer, pairs: list[Pair]) -> None:
    text = pairs[0].text.strip()
    pieces = windows(text, tokenizer, 100, 1000)
    assert "".join(pieces) == text
    assert len(pieces) == -(-len(tokenizer(text, add_special_tokens=False)["input_ids"]) // 100)
    assert windows(text, tokenizer, 100, 2) == pieces[:2]
    assert windows("", tokenizer, 100, 2) == [""]
    encoded = encode_pairs(pairs[:1], tokenizer, text_windows=3, max_text_tokens=100, positions=512)
    assert len(encoded) == 3
    for example, piece in zip(encoded, pieces, strict=False):
        assert example == encode_pair(Pair("0", piece, pairs[0].summary), tokenizer, max_text_tokens=100, positions=512)
