"""Fine-tuning: what each method changes and keeps, merging, resuming, and the one sentence each bad request gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import TEXT, make_tiny_opt
from transformers import AutoTokenizer, OPTForCausalLM

from sparse_engine.checkpoint import Checkpoint
from sparse_engine.convert import convert
from sparse_engine.data import AnswerCollator, Pair, encode_pairs
from sparse_engine.errors import InputError, SparseEngineError
from sparse_engine.evaluate.answer import answer_likelihood
from sparse_engine.evaluate.summarise import summarise_many
from sparse_engine.hf import EngineOPTForCausalLM, SparseOPTForCausalLM
from sparse_engine.pattern import SparsityPattern
from sparse_engine.train.adapters import Adapter, load_adapter
from sparse_engine.train.base import masks_of
from sparse_engine.train.finetune import RECORD, finetune
from sparse_engine.train.masked_lora import MaskedLora
from sparse_engine.train.merge import merge
from sparse_engine.train.settings import FinetuneSettings
from sparse_engine.train.trainer import distillation_loss, hidden_loss

CPU = torch.device("cpu")
PAIRS = [Pair(str(i), f"Bill {i}. {TEXT[: 20 + 5 * i]}", f"Repairs {i} bridges.") for i in range(12)]
TRAIN, HELD_OUT = PAIRS[:8], PAIRS[8:]
PATTERNS = ("2:4", "4:8", "0.5")


def settings(method: str, **others: object) -> FinetuneSettings:
    return FinetuneSettings.from_dict(
        {"method": method, "batch_size": 4, "epochs": 2, "evaluations": 1, "rank": 4, "max_text_tokens": 40} | others
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_opt(tmp_path_factory.mktemp("finetune") / "dense", max_position_embeddings=512, dropout=0.1)


@pytest.fixture(scope="module")
def pruned(dense: Path) -> dict[str, Path]:
    made = {}
    for pattern in PATTERNS:
        made[pattern] = dense.with_name("pruned-" + pattern.replace(":", "of"))
        convert(dense, made[pattern], pattern=SparsityPattern.parse(pattern))
    return made


def _zeros_kept(path: Path, base: Path) -> None:
    """Every linear of ``path`` is zero wherever the base's mask removes a weight."""
    masks = masks_of(Checkpoint(base))
    assert len(masks) == 12
    written = Checkpoint(path)
    for name, mask in masks.items():
        assert not (written.weight(name) != 0)[~mask.keep].any(), name
        assert masks_of(written)[name].pattern == mask.pattern


def _loss(model, path: Path) -> float:
    return answer_likelihood(model, AutoTokenizer.from_pretrained(path), HELD_OUT, max_text_tokens=40).nll_per_token


def test_full_lowers_the_loss_that_it_reports(dense: Path, tmp_path: Path) -> None:
    report = finetune(str(dense), tmp_path / "out", TRAIN, HELD_OUT, settings("full", learning_rate=1e-2, epochs=5))
    model = OPTForCausalLM.from_pretrained(report.out)
    assert _loss(model, dense) == pytest.approx(report.validation_loss, rel=1e-4)
    assert report.validation_loss < _loss(OPTForCausalLM.from_pretrained(dense), dense) - 0.5
    record = json.loads((report.out / RECORD).read_text())
    assert record["settings"]["method"] == "full"
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparse_full_trains_kept_weights_and_no_others(pruned: dict[str, Path], dense: Path, tmp_path: Path, pattern: str) -> None:
    report = finetune(
        str(pruned[pattern]), tmp_path / "out", TRAIN, HELD_OUT, settings("sparse-full", learning_rate=1e-2), teacher=str(dense)
    )
    _zeros_kept(report.out, pruned[pattern])
    before, after = Checkpoint(pruned[pattern]), Checkpoint(report.out)
    assert after.kind == "sparse_engine"
    assert all(not torch.equal(before.weight(name), after.weight(name)) for name in before.packed_layers)
    assert _loss(SparseOPTForCausalLM.from_pretrained(report.out), dense) == pytest.approx(report.validation_loss, rel=1e-4)


def test_masked_dense_weights_are_as_good_a_start_as_packed_ones(dense: Path, tmp_path: Path) -> None:
    masked = tmp_path / "masked"
    convert(dense, masked, pattern=SparsityPattern.parse("2:4"), output="dense")
    report = finetune(str(masked), tmp_path / "out", TRAIN, HELD_OUT, settings("sparse-full", max_steps=2))
    _zeros_kept(report.out, masked)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparse_lora_merges_exactly_and_keeps_the_mask(pruned: dict[str, Path], tmp_path: Path, pattern: str) -> None:
    base = pruned[pattern]
    finetune(str(base), tmp_path / "adapter", TRAIN, HELD_OUT, settings("sparse-lora", learning_rate=1e-2))
    merged = merge(tmp_path / "adapter", tmp_path / "merged")
    assert (merged.merged_layers, merged.masked_layers, merged.dropped) == (10, 12, 0.0)
    _zeros_kept(merged.out, base)
    adapted = load_adapter(Adapter(tmp_path / "adapter"), CPU)
    assert sum(isinstance(module, MaskedLora) for module in adapted.modules()) == 10
    ids = torch.randint(4, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = SparseOPTForCausalLM.from_pretrained(merged.out)(input_ids=ids).logits
        torch.testing.assert_close(found, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        beside = load_adapter(Adapter(tmp_path / "adapter"), CPU, packed=True)(input_ids=ids).logits
        torch.testing.assert_close(found, beside, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, SparseOPTForCausalLM.from_pretrained(base)(input_ids=ids).logits, atol=1e-2)


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 5e-3), (8, 5e-2)])
def test_sparse_lora_over_a_quantised_base_merges_what_was_trained(
    pruned: dict[str, Path], tmp_path: Path, bits: int, tolerance: float
) -> None:
    finetune(str(pruned["2:4"]), tmp_path / "adapter", TRAIN, HELD_OUT, settings("sparse-lora", bits=bits, learning_rate=1e-2))
    merged = merge(tmp_path / "adapter", tmp_path / "merged")
    _zeros_kept(merged.out, pruned["2:4"])
    ids = torch.randint(4, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        trained = load_adapter(Adapter(tmp_path / "adapter"), CPU)(input_ids=ids).logits
        found = SparseOPTForCausalLM.from_pretrained(merged.out)(input_ids=ids).logits
    # The quantised products round activations (LLM.int8 to 8 bits, 4-bit to the compute type), which no merged model does.
    assert float((found - trained).norm() / trained.norm()) < tolerance


def test_qlora_of_a_dense_model_merges_and_of_a_pruned_one_is_refused(dense: Path, pruned: dict[str, Path], tmp_path: Path) -> None:
    finetune(str(dense), tmp_path / "dense", TRAIN, HELD_OUT, settings("qlora", bits=4, learning_rate=1e-2))
    plain = merge(tmp_path / "dense", tmp_path / "dense-merged")
    ids = torch.randint(4, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        trained = load_adapter(Adapter(tmp_path / "dense"), CPU)(input_ids=ids).logits
        torch.testing.assert_close(OPTForCausalLM.from_pretrained(plain.out)(input_ids=ids).logits, trained, rtol=1e-3, atol=1e-3)
    finetune(str(pruned["2:4"]), tmp_path / "pruned", TRAIN, HELD_OUT, settings("qlora", learning_rate=1e-2))
    with pytest.raises(InputError, match=r"would fill the zeros of its pruned base.*--method sparse-lora.*--apply-mask"):
        merge(tmp_path / "pruned", tmp_path / "pruned-merged")
    assert not (tmp_path / "pruned-merged").exists()
    masked = merge(tmp_path / "pruned", tmp_path / "pruned-merged", apply_mask=True)
    _zeros_kept(masked.out, pruned["2:4"])
    # Half of the entries are removed, so some 70 % of the update's norm goes.
    assert 0.5 < masked.dropped < 0.9


def test_an_adapter_whose_base_was_moved_asks_for_it(dense: Path, tmp_path: Path) -> None:
    finetune(str(dense), tmp_path / "adapter", TRAIN, HELD_OUT, settings("qlora", bits=0, max_steps=1))
    record = json.loads((tmp_path / "adapter" / RECORD).read_text())
    (tmp_path / "adapter" / RECORD).write_text(json.dumps(record | {"base": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match=r"needs its base model: .*gone; name where it is with --base"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert merge(tmp_path / "adapter", tmp_path / "merged", base=str(dense)).merged_layers == 10
    with pytest.raises(InputError, match="is no adapter"):
        merge(dense, tmp_path / "again")


class _Stop(Exception):
    pass


def _stopping(after: int):
    def track(items, description, total):
        for done, item in enumerate(items):
            if description.startswith("fine-tuning") and done == after:
                raise _Stop
            yield item

    return track


@pytest.mark.parametrize("method", ["full", "sparse-full", "sparse-lora"])
def test_an_interrupted_run_resumes_to_the_same_weights(dense: Path, pruned: dict[str, Path], tmp_path: Path, method: str) -> None:
    source = str(dense if method == "full" else pruned["2:4"])
    chosen = settings(method, learning_rate=1e-3, epochs=3)
    whole = finetune(source, tmp_path / "whole", TRAIN, HELD_OUT, chosen)
    with pytest.raises(_Stop):
        finetune(source, tmp_path / "cut", TRAIN, HELD_OUT, chosen, track=_stopping(3))
    assert (tmp_path / "cut.partial" / "checkpoint-2").is_dir()
    with pytest.raises(InputError, match=r"started differently \(settings\): resume as it was started, or drop --resume"):
        finetune(source, tmp_path / "cut", TRAIN, HELD_OUT, settings(method, learning_rate=1e-2, epochs=3), resume=True)
    cut = finetune(source, tmp_path / "cut", TRAIN, HELD_OUT, chosen, resume=True)
    assert cut.steps == whole.steps == 6
    assert cut.validation_loss == pytest.approx(whole.validation_loss, rel=1e-6)
    names = sorted(file.name for file in whole.out.glob("*.safetensors"))
    assert names
    assert all((whole.out / name).read_bytes() == (cut.out / name).read_bytes() for name in names)


def test_a_broken_loss_stops_and_keeps_the_last_good_checkpoint(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_engine.train.trainer import SparseTrainer

    original = SparseTrainer.compute_loss

    def broken(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        if model.training and self.state.global_step >= 3:
            loss = loss * float("nan")
            self.broken |= ~torch.isfinite(loss.detach())
        return loss

    monkeypatch.setattr(SparseTrainer, "compute_loss", broken)
    with pytest.raises(SparseEngineError, match=r"NaN or infinite by step 4; the last good checkpoint is in .*checkpoint-2: lower --lr"):
        finetune(str(dense), tmp_path / "out", TRAIN, HELD_OUT, settings("full", epochs=5))
    kept = OPTForCausalLM.from_pretrained(tmp_path / "out.partial" / "checkpoint-2")
    assert all(bool(torch.isfinite(p).all()) for p in kept.parameters())
    assert not (tmp_path / "out").exists()


def test_weights_that_the_last_update_broke_are_not_written(dense: Path, tmp_path: Path) -> None:
    chosen = settings("full", max_steps=1, learning_rate=1e38, warmup=0)
    with pytest.raises(SparseEngineError, match=r"validation loss became NaN or infinite by step 1; no checkpoint had been kept yet"):
        finetune(str(dense), tmp_path / "out", TRAIN, HELD_OUT, chosen)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("checkpoint-*"))


def test_a_run_shorter_than_an_evaluation_is_validated_at_its_end(dense: Path, tmp_path: Path) -> None:
    report = finetune(str(dense), tmp_path / "out", TRAIN, HELD_OUT, settings("full", epochs=0.25, batch_size=1))
    assert (report.steps, report.best_step) == (2, 2)
    assert report.validation_loss > 0


def test_early_stopping_ends_a_run_that_only_gets_worse(dense: Path, tmp_path: Path) -> None:
    report = finetune(str(dense), tmp_path / "out", TRAIN, HELD_OUT, settings("full", learning_rate=0.5, epochs=20, patience=2))
    assert report.steps < 40
    assert report.best_step < report.steps


def test_distillation_loss_is_the_divergence_at_the_chosen_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    where = torch.rand(2, 5, generator=generator) < 0.6
    found = distillation_loss(student, teacher, where, 2.0)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1)[where].sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert float(distillation_loss(teacher, teacher, where, 2.0)) == pytest.approx(0, abs=1e-6)


def test_hidden_loss_is_relative_to_the_teacher_and_blind_to_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = tuple(torch.randn(2, 4, 8, generator=generator) for _ in range(3))
    student = (teacher[0] + 9, teacher[1] * 1.1, teacher[2] * 0.8)
    where = torch.tensor([[True] * 4, [True, True, False, False]])
    assert float(hidden_loss(student, teacher, where)) == pytest.approx((0.1**2 + 0.2**2) / 2, rel=1e-4)
    student[1][1, 3] = 1e4
    assert float(hidden_loss(student, teacher, where)) == pytest.approx((0.1**2 + 0.2**2) / 2, rel=1e-4)


@pytest.mark.parametrize("where", ["answer", "all"])
def test_a_pruned_student_comes_closer_to_its_teacher(dense: Path, tmp_path: Path, where: str) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    finetune(str(dense), teacher, TRAIN, HELD_OUT, settings("full", learning_rate=1e-2, epochs=5))
    convert(teacher, student, pattern=SparsityPattern.parse("4:8"))
    chosen = settings(
        "sparse-full", learning_rate=1e-4, epochs=12, distill_weight=1.0, distill_on=where, distill_hidden=0.01, accumulate=2, batch_size=2
    )
    report = finetune(str(student), tmp_path / "out", TRAIN, HELD_OUT, chosen, teacher=str(teacher))
    tokenizer = AutoTokenizer.from_pretrained(dense)
    batch = AnswerCollator(1)(encode_pairs(HELD_OUT, tokenizer, max_text_tokens=40, positions=512))
    with torch.inference_mode():
        taught = OPTForCausalLM.from_pretrained(teacher)(input_ids=batch["input_ids"]).logits

        def distance(path: Path) -> float:
            mine = SparseOPTForCausalLM.from_pretrained(path)(input_ids=batch["input_ids"]).logits
            inside = torch.arange(mine.shape[1]) < batch["lengths"][:, None]
            return float(distillation_loss(mine, taught, inside, 1.0))

        assert distance(report.out) < 0.6 * distance(student)


@pytest.mark.parametrize("answers", ["teacher", "both"])
def test_the_teachers_own_answers_are_learnt(
    dense: Path, pruned: dict[str, Path], tmp_path: Path, answers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(
        "sparse_engine.train.finetune.encode_pairs",
        lambda pairs, *a, **k: written.append(list(pairs)) or encode_pairs(written[-1], *a, **k),
    )
    chosen = settings("sparse-full", learning_rate=1e-3, epochs=1, answers=answers, max_summary_tokens=12)
    report = finetune(str(pruned["2:4"]), tmp_path / "out", TRAIN, HELD_OUT, chosen, teacher=str(dense))
    own = [
        text
        for text, _ in summarise_many(
            EngineOPTForCausalLM.from_pretrained(dense),
            AutoTokenizer.from_pretrained(dense),
            [p.text for p in TRAIN],
            max_new_tokens=12,
            max_text_tokens=40,
        )
    ]
    assert any(own)
    taught = [text or pair.summary for text, pair in zip(own, TRAIN, strict=True)]
    assert [p.summary for p in written[0]] == ([p.summary for p in TRAIN] if answers == "both" else []) + taught
    assert written[1] == HELD_OUT
    assert report.steps == len(written[0]) // 4


def test_answers_of_a_teacher_need_one(pruned: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--answers both needs a --teacher"):
        finetune(str(pruned["2:4"]), tmp_path / "out", TRAIN, HELD_OUT, settings("sparse-full", answers="both"))


def test_accumulated_steps_are_one_larger_batch(dense: Path, pruned: dict[str, Path], tmp_path: Path) -> None:
    losses = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        chosen = settings("sparse-full", learning_rate=1e-3, batch_size=batch_size, accumulate=accumulate, distill_on="all", warmup=0)
        report = finetune(str(pruned["2:4"]), tmp_path / str(accumulate), TRAIN, HELD_OUT, chosen, teacher=str(dense))
        losses.append((report.steps, report.validation_loss))
    assert losses[0][0] == losses[1][0] == 4
    assert losses[0][1] == pytest.approx(losses[1][1], rel=1e-3)


def test_methods_that_do_not_suit_the_checkpoint_are_refused(dense: Path, pruned: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is dense, and --method sparse-full trains under a mask"):
        finetune(str(dense), tmp_path / "out", TRAIN, HELD_OUT, settings("sparse-full"))
    with pytest.raises(InputError, match=r"is pruned, and --method full would fill its zeros again"):
        finetune(str(pruned["2:4"]), tmp_path / "out", TRAIN, HELD_OUT, settings("full"))
    with pytest.raises(InputError, match="got 0 and 4"):
        finetune(str(dense), tmp_path / "out", [], HELD_OUT, settings("full"))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists; choose another --out"):
        finetune(str(dense), tmp_path / "out", TRAIN, HELD_OUT, settings("full"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "lora"}, "method 'lora' is unknown: use full, qlora, sparse-lora, sparse-full"),
        ({"bits": 3}, "bits 3 is unknown: use 0, 4, 8"),
        ({"bits": 8}, "quantises a frozen base under adapters; full trains the base itself"),
        ({"epochs": 0}, "epochs must be a number above 0"),
        ({"distill_weight": 2}, "distill_weight must lie from 0 to 1"),
        ({"learning_rat": 1}, "no setting 'learning_rat'"),
        ({"epochs": "many"}, "wrong type"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FinetuneSettings.from_dict(values)


def test_a_teacher_of_another_vocabulary_is_refused(pruned: dict[str, Path], tmp_path: Path) -> None:
    other = make_tiny_opt(tmp_path / "other", vocab_size=336)
    with pytest.raises(InputError, match="has 336 tokens, the student 320"):
        finetune(str(pruned["2:4"]), tmp_path / "out", TRAIN, HELD_OUT, settings("sparse-full"), teacher=str(other))


def test_a_quantised_base_without_bitsandbytes_says_what_to_use(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"needs bitsandbytes .*--bits 0 trains adapters over an unquantised base"):
        finetune(str(dense), tmp_path / "out", TRAIN, HELD_OUT, settings("qlora"))


def test_every_method_trains_a_post_norm_model_with_projections(tmp_path: Path) -> None:
    # OPT-350m alone has no final layer norm, norms behind the blocks, and embeddings narrower than the model.
    sizes = {"max_position_embeddings": 512, "hidden_size": 128, "word_embed_proj_dim": 64}
    dense = make_tiny_opt(tmp_path / "dense", do_layer_norm_before=False, **sizes)
    pruned = tmp_path / "pruned"
    convert(dense, pruned, pattern=SparsityPattern.parse("2:4"))
    finetune(str(dense), tmp_path / "full", TRAIN, HELD_OUT, settings("full", learning_rate=1e-3))
    chosen = settings("sparse-full", learning_rate=1e-3, distill_on="all", distill_hidden=0.1)
    _zeros_kept(finetune(str(pruned), tmp_path / "kept", TRAIN, HELD_OUT, chosen, teacher=str(tmp_path / "full")).out, pruned)
    finetune(str(pruned), tmp_path / "lora", TRAIN, HELD_OUT, settings("sparse-lora", learning_rate=1e-2))
    merged = merge(tmp_path / "lora", tmp_path / "merged")
    _zeros_kept(merged.out, pruned)
    ids = torch.randint(4, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = SparseOPTForCausalLM.from_pretrained(merged.out)(input_ids=ids).logits
        torch.testing.assert_close(found, load_adapter(Adapter(tmp_path / "lora"), CPU)(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    for bits in (8, 4):
        finetune(str(pruned), tmp_path / f"qlora-{bits}", TRAIN, HELD_OUT, settings("qlora", bits=bits, max_steps=1))
        assert Adapter(tmp_path / f"qlora-{bits}").settings.bits == bits


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "bits"), [("qlora", 8), ("qlora", 4), ("sparse-lora", 8), ("sparse-full", None), ("full", None)])
def test_each_method_trains_on_a_gpu(dense: Path, pruned: dict[str, Path], tmp_path: Path, method: str, bits: int | None) -> None:
    source = pruned["2:4"] if method.startswith("sparse") else dense
    teacher = str(dense) if method == "sparse-full" else None
    report = finetune(
        str(source), tmp_path / "out", TRAIN, HELD_OUT, settings(method, bits=bits, learning_rate=1e-2), teacher=teacher, device="cuda"
    )
    assert report.validation_loss < 6
    if method == "sparse-full":
        _zeros_kept(report.out, source)
    if method == "sparse-lora":
        _zeros_kept(merge(report.out, tmp_path / "merged").out, source)
