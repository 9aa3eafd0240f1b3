"""Perplexity against a direct computation, ROUGE against known values, summaries by the shipped model."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, OPTForCausalLM

from sparse_engine.demo.embedded import CHECKPOINT, bills
from sparse_engine.errors import InputError
from sparse_engine.evaluate import document_perplexity, rouge, window_perplexity
from sparse_engine.evaluate.summarise import summarise


@pytest.fixture(scope="module")
def model(tiny_opt: Path):
    return OPTForCausalLM.from_pretrained(tiny_opt)


def _nll(model, ids: torch.Tensor) -> float:
    with torch.inference_mode():
        logits = model(input_ids=ids[None]).logits[0].double()
    return float(-logits.log_softmax(-1)[:-1].gather(1, ids[1:, None]).sum())


def test_window_perplexity_is_over_whole_windows(model) -> None:
    tokens = torch.randint(4, 300, (5 * 24 + 7,), generator=torch.Generator().manual_seed(0))
    found = window_perplexity(model, tokens, 24)
    nll = sum(_nll(model, tokens[at : at + 24]) for at in range(0, 120, 24))
    assert found.tokens == 5 * 23
    assert found.nll == pytest.approx(nll, rel=1e-5)
    assert found.ppl == pytest.approx(math.exp(nll / 115), rel=1e-5)


def test_document_perplexity_weighs_tokens_and_cuts_documents(model) -> None:
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(4, 300, (n,), generator=generator) for n in (3, 1, 60, 20)]
    found = document_perplexity(model, documents, 32)
    assert found.tokens == 2 + 31 + 19
    assert found.nll == pytest.approx(sum(_nll(model, ids[:32]) for ids in documents if len(ids) > 1), rel=1e-5)


def test_logits_are_taken_in_parts_without_changing_the_sum(model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(4, 300, (100,), generator=torch.Generator().manual_seed(2))
    whole = document_perplexity(model, [ids], 100)
    monkeypatch.setattr("sparse_engine.evaluate.perplexity._LOSS_ROWS", 7)
    assert document_perplexity(model, [ids], 100).nll == pytest.approx(whole.nll, rel=1e-6)


def test_perplexity_needs_tokens(model) -> None:
    with pytest.raises(InputError, match="windows of 2048 tokens needs at least as many, got 10"):
        window_perplexity(model, torch.arange(10))
    with pytest.raises(InputError, match="at least two tokens"):
        document_perplexity(model, [torch.tensor([5])], 32)


def test_rouge_of_known_pairs() -> None:
    found = rouge(["the cat sat", ""], ["the cat ran", "the cat ran"])
    # First pair: 2 of 3 unigrams, 1 of 2 bigrams, common subsequence of 2 of 3; the blank one scores 0.
    assert found.rouge1 == pytest.approx((2 / 3) / 2)
    assert found.rouge2 == pytest.approx((1 / 2) / 2)
    assert found.rougeL == pytest.approx((2 / 3) / 2)
    assert rouge(["bridges"], ["bridge"], stemmer=True).rouge1 == 1.0


def test_rouge_refuses_what_it_cannot_score(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="got 1 and 2"):
        rouge(["a"], ["a", "b"])
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InputError, match="needs the rouge-score package"):
        rouge(["a"], ["a"])


def test_the_shipped_model_summarises_and_stops_at_the_end_mark() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = OPTForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    bill = bills().rows[0]
    made = summarise(model, tokenizer, [bill["text"]])[0]
    assert "### End" in tokenizer.decode(made.tokens)
    assert "###" not in made.text
    assert made.text.startswith("Rural Covered Bridge Repair Act")
    assert rouge([made.text], [bill["summary"]]).rougeL > 0.3


def test_a_summary_has_at_most_the_tokens_asked_for_and_a_long_bill_fits(tiny_opt: Path) -> None:
    # Room for prompt and summary is bounded by the model's positions, which a bill of any length must respect.
    tokenizer = AutoTokenizer.from_pretrained(tiny_opt)
    wide = OPTForCausalLM.from_pretrained(CHECKPOINT)
    made = summarise(wide, AutoTokenizer.from_pretrained(CHECKPOINT), ["A bill. " * 5000], max_new_tokens=3, max_text_tokens=10_000)[0]
    assert len(made.tokens) <= 3
    with pytest.raises(InputError, match="no room for text"):
        summarise(OPTForCausalLM.from_pretrained(tiny_opt), tokenizer, ["A bill."], max_new_tokens=100)
