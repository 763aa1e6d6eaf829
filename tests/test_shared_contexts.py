"""Rows that share contexts: the same logits, loss, gradients and steps as separate examples."""

import functools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from helpers import (
    ARCHITECTURES,
    SHARED_DATA,
    collator,
    dataset_folder,
    difference,
    encode_paragraphs,
    encoded_dataset,
    flatten,
    make_records,
    make_trainer,
    model_folder,
    read_quickstart,
    tiny_model,
    tiny_tokenizer,
)
from peft import LoraConfig, get_peft_model

from llama_squad.arguments import TrainArguments
from llama_squad.collator import SquadDataCollator
from llama_squad.data import read_files
from llama_squad.encoding import IGNORE, ChatEncoder, label_all
from llama_squad.predictors import base
from llama_squad.prompts import Record
from llama_squad.training.arguments import SquadSFTConfig
from llama_squad.training.packing import group_paragraphs, plan_rows, row_dataset
from llama_squad.training.setup import check_shared_contexts, lay_out, make_validation
from llama_squad.training.trainer import SquadTrainer, answer_loss
from llama_squad.tree import Tree

PARAGRAPHS = encode_paragraphs(make_records(3, [3, 1, 2]))
EXACT = {torch.float32: 1e-5, torch.float64: 1e-10}


def shared_batches(layout: str, paragraphs: list = PARAGRAPHS) -> list[dict[str, torch.Tensor]]:
    """Collate paragraphs in one of the ways that rows may hold them."""
    collate = collator()
    if layout == "one paragraph per row":
        return [collate([{"paragraphs": [p]}]) for p in paragraphs]
    if layout == "all in a row":  # with the system prompt shared by the paragraphs: nested
        return [collate([{"paragraphs": paragraphs}])]
    assert layout == "padded rows"
    return [collate([{"paragraphs": paragraphs[:2]}, {"paragraphs": paragraphs[2:]}])]


def separate_batches(paragraphs: list = PARAGRAPHS) -> list[dict[str, torch.Tensor]]:
    """Collate each example on its own."""
    collate = collator()
    return [collate([example]) for example in flatten(paragraphs)]


def with_lora(model: Any, dropout: float = 0.0) -> Any:
    """Put an adapter on a model, no matrix of it zero."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=dropout
    )
    model = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def assert_equal(found: dict[str, float], limit: float) -> None:
    """Compare what ``difference`` found with a limit."""
    assert max(found.values()) < limit, found


# Equality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture, dtype)
    found = difference(model, shared_batches("padded rows"), separate_batches())
    assert_equal(found, EXACT[dtype])


@pytest.mark.parametrize("layout", ["one paragraph per row", "all in a row"])
def test_layouts(layout: str) -> None:
    found = difference(tiny_model(), shared_batches(layout), separate_batches())
    assert_equal(found, 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3_text", "phi3"])
def test_lora_and_checkpointing(architecture: str, checkpointing: bool) -> None:
    model = with_lora(tiny_model(architecture))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        assert model.is_gradient_checkpointing
    found = difference(model, shared_batches("all in a row"), separate_batches())
    assert_equal(found, 1e-5)


def test_checkpointing_of_all_parameters() -> None:
    model = tiny_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_equal(difference(model, shared_batches("padded rows"), separate_batches()), 1e-5)


@pytest.mark.parametrize("prompt", ["single_turn", "multi_turn"])
@pytest.mark.parametrize("reasoning_tokens", [0, 4])
def test_prompts_and_reasoning_tokens(prompt: str, reasoning_tokens: int) -> None:
    paragraphs = encode_paragraphs(make_records(2, [2]), prompt, reasoning_tokens)
    token = tiny_tokenizer().added_tokens_encoder["<|reserved_special_token_0|>"]
    assert all(e["input_ids"].count(token) == reasoning_tokens for e in flatten(paragraphs))
    shared = collator()([{"paragraphs": paragraphs}])
    plain = sum(len(e["input_ids"]) for e in flatten(paragraphs))
    assert shared["input_ids"].shape[1] < 0.75 * plain, "nothing is shared"
    assert_equal(difference(tiny_model(), [shared], separate_batches(paragraphs)), 1e-5)


def test_a_paragraph_of_one_question_and_one_token_apart() -> None:
    # examples that part at their last prompt token, or only in the answer
    prompt = [5, 6, 7, 8, 9]
    examples = [
        {"input_ids": prompt + tail, "labels": [IGNORE] * 5 + tail}
        for tail in ([1, 2], [1, 3], [4])
    ]
    tree = Tree.build([examples])
    assert tree.input_ids == [5, 6, 7, 8, 9, 1, 2, 9, 1, 3, 9, 4]
    assert tree.position_ids == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 4, 5]
    assert tree.ends == [12, 12, 12, 12, 7, 7, 7, 10, 10, 10, 12, 12]
    batches = [
        collator()([{"paragraphs": [examples]}]),
        collator()([{"paragraphs": [examples[:1]]}]),
    ]
    separate = [collator()([example]) for example in [*examples, examples[0]]]
    assert_equal(difference(tiny_model(), batches, separate), 1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("layout", ["one paragraph per row", "all in a row", "padded rows"])
def test_labels_on_all_tokens(layout: str, smoothing: float) -> None:
    """A token that examples share counts for each of them, and what follows it as well."""
    whole = [[label_all(example) for example in paragraph] for paragraph in PARAGRAPHS]
    found = []
    for batches in (shared_batches(layout, whole), separate_batches(whole)):
        model = tiny_model()
        sums = torch.zeros(3)
        for batch in batches:
            parts = answer_loss(model, batch, smoothing)
            parts[0].backward()
            sums += torch.stack([part.detach().float() for part in parts])
        found.append((sums, [p.grad for p in model.parameters()]))
    (shared, gradients), (separate, wanted) = found
    assert shared[2] == sum(len(e["input_ids"]) - 1 for e in flatten(whole))
    torch.testing.assert_close(shared, separate)
    torch.testing.assert_close(gradients, wanted, atol=1e-3, rtol=1e-4)


def test_examples_of_one_text_share_all_but_its_last_token_where_all_have_labels() -> None:
    first, second = (label_all({"input_ids": [5, 6, 7, end], "labels": []}) for end in (8, 9))
    third = label_all({"input_ids": [5, 3, 2], "labels": []})
    tree = Tree.build([[first, first, second], [third]])
    assert tree.input_ids == [5, 6, 7, 8, 7, 8, 7, 9, 5, 3, 2]
    assert tree.position_ids == [0, 1, 2, 3, 2, 3, 2, 3, 0, 1, 2]
    assert tree.labels == [IGNORE, 6, 7, 8, IGNORE, 8, IGNORE, 9, IGNORE, 3, 2]
    assert tree.weights == [0, 3, 3, 1, 0, 1, 0, 1, 0, 1, 1]


# The silent failures ---------------------------------------------------------------------------


class Forgetful(SquadDataCollator):
    """A collator that loses one of the tensors that rows need."""

    lost = ""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate, and lose it."""
        batch = super().torch_call(examples)
        if "paragraphs" in examples[0]:
            batch.pop(self.lost)
        return batch


@pytest.mark.parametrize("lost", ["attention_mask", "position_ids"])
def test_a_lost_tensor_is_caught(lost: str) -> None:
    model = tiny_model()
    forgetful = Forgetful(pad_token_id=0)
    forgetful.lost = lost
    row = {"paragraphs": PARAGRAPHS}
    assert "Llama" in check_shared_contexts(model, forgetful, row)
    assert check_shared_contexts(model, collator(), row) == ""
    batch = shared_batches("all in a row")[0]
    del batch[lost]
    assert difference(model, [batch], separate_batches())["gradients"] > 1e-2


# Falling back to plain batches ------------------------------------------------------------------


def planned(
    model: Any, encoded: Any, folder: Path, args: TrainArguments | None = None, **settings: Any
) -> tuple[Any, SquadSFTConfig]:
    """Lay out a dataset as the stage does; returns the features and the changed arguments."""
    sft_args = SquadSFTConfig(output_dir=str(folder), report_to="none", bf16=False, **settings)
    layout = lay_out(args or TrainArguments(), sft_args, {"train": encoded}, model, collator())
    return layout.features["train"], sft_args.replace(**layout.settings)


def refuse_4d_masks(model: Any) -> None:
    """Make a model raise as an architecture does that prepares its own masks."""
    forward = model.forward

    def strict(**kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise AttributeError("a 2D mask was expected")
        return forward(**kwargs)

    model.forward = strict


@pytest.mark.parametrize("reason", ["a 2D mask was expected", "as asked"])
def test_fallback(
    reason: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("mistral")
    if "2D" in reason:
        refuse_4d_masks(model)
    encoded = encoded_dataset(make_records(4, [3, 2]))
    args = TrainArguments(share_context=reason != "as asked")
    train, sft_args = planned(
        model, encoded, tmp_path, args, per_device_train_batch_size=2, gradient_accumulation_steps=3
    )
    said = capsys.readouterr().out
    assert "Plain batches, contexts not shared" in said
    assert reason in said
    assert len(train) == len(encoded) == 10
    assert set(train.column_names) >= {"input_ids", "labels"}
    assert (sft_args.per_device_train_batch_size, sft_args.gradient_accumulation_steps) == (2, 3)
    trainer = make_trainer(
        model, train, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3
    )
    assert trainer.train().global_step == 1  # and it trains


def test_a_real_failure_is_not_a_fallback(tmp_path: Path) -> None:
    model = tiny_model()

    def broken(**kwargs: Any) -> None:
        raise RuntimeError("no forward at all")

    model.forward = broken
    with pytest.raises(RuntimeError, match="no forward at all"):
        planned(model, encoded_dataset(make_records(2, [2])), tmp_path)


# Steps of the trainer --------------------------------------------------------------------------

STEP = make_records(4, [1, 3, 2, 2])  # 8 questions


def weights_after(trainer: Any) -> dict[str, torch.Tensor]:
    """Train, and return the trained weights."""
    trainer.train()
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def one_step(kind: str, batch: int, accumulate: int, lora: bool, folder: Path) -> dict[str, Any]:
    """Return the weights after a step over STEP, in rows (2 questions each on average) or plain."""
    torch.manual_seed(0)
    model = with_lora(tiny_model()) if lora else tiny_model()
    encoded = encoded_dataset(STEP)
    train = encoded.select_columns(["input_ids", "labels"])
    if kind == "rows":
        examples = [p.examples for p in group_paragraphs(encoded, None)]
        per_row = len(examples) // (batch * accumulate)
        held = [examples[i : i + per_row] for i in range(0, len(examples), per_row)]
        train = row_dataset(encoded, held)
    trainer = make_trainer(
        model, train, folder,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        gradient_checkpointing=lora,
    )  # fmt: skip
    return weights_after(trainer)


@pytest.mark.parametrize("lora", [False, True])
def test_accumulation(lora: bool, tmp_path: Path) -> None:
    before = with_lora(tiny_model()) if lora else tiny_model()
    start = {name: weight.detach() for name, weight in before.named_parameters()}
    expected = one_step("plain", 8, 1, lora, tmp_path)
    moved = {name: weight - start[name] for name, weight in expected.items()}
    largest = max(float(step.abs().max()) for step in moved.values())
    assert largest > 1e-2
    ways = [("rows", 1, 4), ("rows", 2, 2), ("rows", 4, 1)]
    for kind, batch, accumulate in ways if lora else [*ways, ("plain", 2, 4), ("rows", 1, 1)]:
        found = one_step(kind, batch, accumulate, lora, tmp_path)
        gap = max(float((found[name] - expected[name]).abs().max()) for name in expected)
        assert gap < 1e-5 * largest, (kind, batch, accumulate, gap, largest)


def test_a_step_through_lay_out(tmp_path: Path) -> None:
    # what the stage does from end to end, with AdamW: 8 questions per step, 2 steps, 2 epochs
    encoded = encoded_dataset(STEP)
    model = tiny_model()
    train, sft_args = planned(model, encoded, tmp_path, per_device_train_batch_size=8)
    options = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 2}
    shared = weights_after(
        make_trainer(
            model, train, tmp_path,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=sft_args.gradient_accumulation_steps, **options,
        )
    )  # fmt: skip
    plain = weights_after(
        make_trainer(
            tiny_model(), encoded.select_columns(["input_ids", "labels"]), tmp_path,
            per_device_train_batch_size=8, gradient_accumulation_steps=1, **options,
        )
    )  # fmt: skip
    gaps = torch.cat([(shared[n] - plain[n]).abs().flatten() for n in plain])
    # Adam's step is +-1e-3 whatever the gradient's size: where it is 1e-9, noise decides
    assert gaps.mean() < 1e-7
    start = dict(tiny_model().named_parameters())
    assert torch.cat([(start[n] - plain[n]).abs().flatten() for n in plain]).mean() > 1e-4


def test_the_evaluation_loss_is_that_of_the_tokens_in_any_layout(tmp_path: Path) -> None:
    encoded = encoded_dataset(make_records(4, [1, 6, 2, 3]))
    held = [p.examples for p in group_paragraphs(encoded, None)]
    plain = encoded.select_columns(["input_ids", "labels"])
    layouts = [(row_dataset(encoded, rows), 1) for rows in ([[p] for p in held], [held])]
    layouts += [(row_dataset(encoded, [[p] for p in held]), 2), (plain, 1), (plain, 5)]
    losses = []
    for dataset, batch in layouts:
        options = {"per_device_eval_batch_size": batch}
        trainer = make_trainer(tiny_model(), plain, tmp_path, **options)
        losses.append(trainer.evaluate(dataset)["eval_loss"])
    batch = collator()(list(plain))
    with torch.no_grad():
        loss, _, tokens = answer_loss(tiny_model(), batch)
    assert losses == pytest.approx([float(loss / tokens)] * 5, rel=1e-5)


def test_a_model_that_takes_no_loss_arguments_trains_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some say so, such as Gemma 4: their steps would be the mean of rows, not of tokens."""
    expected = one_step("rows", 1, 4, False, tmp_path)
    monkeypatch.setattr(type(tiny_model()), "accepts_loss_kwargs", False, raising=False)
    found = one_step("rows", 1, 4, False, tmp_path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_all_parameters_are_trained_in_the_type_that_was_asked_for(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    train = encoded_dataset(STEP).select_columns(["input_ids", "labels"])
    trainer = make_trainer(tiny_model(dtype=dtype), train, tmp_path)
    trained = torch.float32 if dtype == torch.float16 else dtype  # whose steps it cannot hold
    assert {weight.dtype for weight in weights_after(trainer).values()} == {trained}
    adapted = make_trainer(with_lora(tiny_model(dtype=dtype)), train, tmp_path)
    assert {weight.dtype for weight in weights_after(adapted).values()} == {torch.float32}


# What a step and an epoch hold -----------------------------------------------------------------


class Recorder(SquadDataCollator):
    """A collator that remembers the examples it was given, and counts its trees' branches."""

    seen: list[tuple[int, ...]]
    questions: int

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate and remember."""
        for row in examples:
            for example in flatten(row["paragraphs"]) if "paragraphs" in row else [row]:
                self.seen.append(tuple(example["input_ids"]))
        batch = super().torch_call(examples)
        self.questions += int(batch["counts"][:, 0].sum())
        return batch


def recorder() -> Recorder:
    """Make a recorder."""
    made = Recorder(pad_token_id=tiny_tokenizer().pad_token_id, counts=True)
    made.seen, made.questions = [], 0  # SquadDataCollator is a dataclass
    return made


@functools.cache
def many_paragraphs() -> tuple[Any, list[dict]]:
    """Encode 61 paragraphs; returns the dataset, and its examples."""
    encoded = encoded_dataset(make_records(61, [7, 5, 9, 6, 1, 12]))
    return encoded, encoded.select_columns(["input_ids", "labels"]).to_list()


@pytest.mark.parametrize("questions", [1, 8, 16, 37, 64])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_plan(questions: int, processes: int) -> None:
    encoded, examples = many_paragraphs()
    asked = {"questions_per_step": questions, "processes": processes, "row_tokens": 1200}
    plan = plan_rows(encoded, max_length=2000, seed=3, **asked)
    found = [index for row in plan.rows for group in row for index in group]
    assert sorted(found) == list(range(len(encoded)))
    assert len(plan.rows) % processes == 0
    # the nearest whole number of paragraphs, at least one per process
    mean = len(encoded) / 61
    nearest = max(1, round(questions / mean / processes)) * processes
    assert plan.paragraphs_per_step == nearest
    # a row more or two, so that their number is right, is much among 61 paragraphs
    assert plan.questions_per_step == pytest.approx(nearest * mean, rel=0.1)
    tokens = 0
    for row in plan.rows:
        tree = Tree.build([[examples[i] for i in group] for group in row])
        assert len(tree.input_ids) <= 2000
        tokens += len(tree.input_ids)
    assert plan.tokens == pytest.approx(tokens, rel=0.02)
    assert plan.plain_tokens == sum(encoded["length"])


def test_a_paragraph_that_does_not_fit_is_split_never_cut() -> None:
    encoded = encoded_dataset(make_records(3, [40, 2]))
    limit = 500
    plan = plan_rows(
        encoded, questions_per_step=8, processes=1, row_tokens=400, max_length=limit, seed=0
    )
    examples = encoded.select_columns(["input_ids", "labels"])
    seen = []
    for row in plan.rows:
        tree = Tree.build([[examples[i] for i in group] for group in row])
        assert len(tree.input_ids) <= limit
        batch = collator(counts=True)(
            [{"paragraphs": [[examples[i] for i in group] for group in row]}]
        )
        assert batch["counts"][0, 0] == sum(map(len, row))
        seen += [i for group in row for i in group]
    assert sorted(seen) == list(range(len(encoded)))
    assert len(plan.rows) > 10


@pytest.mark.parametrize(("paragraphs", "processes"), [(101, 2), (4, 3), (7, 4)])
def test_paragraphs_of_one_question_on_several_processes(paragraphs: int, processes: int) -> None:
    """Nothing can be split, so rows are put together: each question once, and as many a process."""
    encoded = encoded_dataset(make_records(paragraphs, [1]))
    asked = {"questions_per_step": 1, "row_tokens": 300, "seed": 0, "processes": processes}
    plan = plan_rows(encoded, max_length=4000, **asked)
    assert len(plan.rows) % processes == 0
    found = [index for row in plan.rows for group in row for index in group]
    assert sorted(found) == list(range(paragraphs))
    with pytest.raises(ValueError, match="raise --max_seq_length"):
        plan_rows(encoded, max_length=max(encoded["length"]), **asked)
    with pytest.raises(ValueError, match="fewer training questions than processes"):
        plan_rows(encoded, max_length=4000, **asked | {"processes": paragraphs + 1})
    with pytest.raises(ValueError, match="fewer training questions than processes"):  # none shares
        too_many = {"processes": paragraphs + 1, "longest_shared": 1}
        plan_rows(encoded, max_length=4000, **asked | too_many)


def test_validation_goes_on_where_the_architecture_cannot_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = tiny_model()
    refuse_4d_masks(model)
    records = make_records(2, [2])
    config = SquadSFTConfig(output_dir=str(tmp_path), report_to="none")
    dataset = {"val": Dataset.from_list(records)}
    validate = make_validation(config, dataset, str(tmp_path), ChatEncoder(tiny_tokenizer()))
    assert validate is not None
    assert validate(model) == {}
    assert "only their loss" in capsys.readouterr().out
    assert set(validate(tiny_model())) >= {"exact_match", "valid_json"}


def test_advice_below_eight_paragraphs() -> None:
    encoded = encoded_dataset(make_records(40, [4]))
    for questions, advised in ((16, True), (64, False)):
        plan = plan_rows(
            encoded,
            questions_per_step=questions,
            processes=1,
            row_tokens=2048,
            max_length=4096,
            seed=0,
        )
        assert (f"A step holds {questions // 4} paragraphs, {questions}.0 questions"
                in plan.describe())  # fmt: skip
        assert ("Fewer than 8 paragraphs" in plan.describe()) is advised


class Counting(SquadTrainer):
    """Our trainer, which keeps how many questions each step held, by its number."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.held: Counter[int] = Counter()

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Count, and train."""
        self.held[self.state.global_step] += int(inputs["counts"][:, 0].sum())
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("share_context", [True, False])
@pytest.mark.parametrize(
    ("paragraphs", "questions", "batch", "accumulate", "row_tokens"),
    [
        (2, 5, 20, 1, 300),  # all that there are are fewer than asked for, in a row each,
        (2, 5, 20, 1, 2048),  # in one row,
        (2, 5, 4, 5, 300),
        (5, 5, 10, 2, 300),  # a step of four paragraphs, and one
        (8, 1, 4, 2, 2048),
        (6, 3, 2, 3, 2048),
    ],
)
def test_what_is_said_of_a_step_is_true(
    paragraphs: int,
    questions: int,
    batch: int,
    accumulate: int,
    row_tokens: int,
    share_context: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    encoded = encoded_dataset(make_records(paragraphs, [questions]))
    model = tiny_model(hidden_size=8, num_hidden_layers=1)
    args = TrainArguments(share_context=share_context, row_tokens=row_tokens)
    train, sft_args = planned(
        model, encoded, tmp_path, args,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    said = re.search(
        r"A step holds (?:(\d+) paragraphs, )?([\d.]+) questions(?: on average)?([^.]*)\.",
        capsys.readouterr().out, re.M,
    )  # fmt: skip
    assert said
    trainer = make_trainer(
        model, train, tmp_path, max_steps=-1, num_train_epochs=1, logging_steps=1,
        per_device_train_batch_size=sft_args.per_device_train_batch_size,
        gradient_accumulation_steps=sft_args.gradient_accumulation_steps, trainer=Counting,
    )  # fmt: skip
    trainer.train()
    held = [trainer.held[step] for step in sorted(trainer.held)]
    assert sum(held) == paragraphs * questions
    full = held[:-1] or held
    if said[1]:
        assert int(said[1]) == round(sum(full) / len(full) / questions)
    assert float(said[2]) == pytest.approx(sum(full) / len(full), abs=0.05)
    assert ("all that there are" in said[3]) is (len(held) == 1)
    assert ("the last of an epoch" in said[3]) is (held[-1] < held[0])


def test_throughput_counts_are_true(tmp_path: Path) -> None:
    encoded = encoded_dataset(STEP)
    model = tiny_model()
    train, sft_args = planned(model, encoded, tmp_path, per_device_train_batch_size=4)
    trainer = make_trainer(
        model, train, tmp_path, max_steps=-1, num_train_epochs=3, logging_steps=1,
        gradient_accumulation_steps=sft_args.gradient_accumulation_steps,
        per_device_train_batch_size=1,
    )  # fmt: skip
    trainer.data_collator = recorder()
    trainer.train()
    assert Counter(trainer.data_collator.seen) == Counter(
        {tuple(ids): 3 for ids in encoded["input_ids"]}
    )
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    trees = [Tree.build(row["paragraphs"]) for row in train]
    tokens, plain = sum(len(t.input_ids) for t in trees), sum(encoded["length"])
    assert logs[-1]["num_tokens"] == 3 * tokens
    assert sum(entry["tokens_saved"] for entry in logs) / len(logs) == pytest.approx(
        1 - tokens / plain, abs=0.05
    )
    seconds = [entry["tokens_per_second"] / entry["questions_per_second"] for entry in logs]
    assert sum(seconds) / len(seconds) == pytest.approx(tokens / 8, rel=0.2)


def test_all_figures_of_the_throughput_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with evaluations in between, steps after the last log, and another training before."""
    encoded = encoded_dataset(STEP)
    model = tiny_model(hidden_size=8, num_hidden_layers=1)
    train, sft_args = planned(model, encoded, tmp_path, per_device_train_batch_size=4)
    validation = encoded_dataset(make_records(3, [2], seed=3))
    held = [p.examples for p in group_paragraphs(validation, None)]

    now = [0.0]  # a step takes a second, a validation a hundred
    monkeypatch.setattr(
        "llama_squad.training.trainer.time", SimpleNamespace(perf_counter=lambda: now[0])
    )

    class Clocked(Counting):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            now[0] += 1 / self.args.gradient_accumulation_steps
            return super().training_step(*args, **kwargs)

    def slowly(model: Any) -> dict[str, float]:
        now[0] += 100
        return {}

    trainer = make_trainer(
        model, train, tmp_path, max_steps=7, logging_steps=3, eval_strategy="steps", eval_steps=2,
        gradient_accumulation_steps=sft_args.gradient_accumulation_steps,
        per_device_train_batch_size=1,
        trainer=functools.partial(
            Clocked, validate=slowly, eval_dataset=row_dataset(validation, [held])
        ),
    )  # fmt: skip
    for _ in range(2):
        trainer.held.clear()
        result = trainer.train().metrics
        logs = [e for e in trainer.state.log_history if "loss" in e]
        counts = [trainer.held[step] for step in range(7)]
        rates = [entry["questions_per_second"] for entry in logs]
        assert rates == [round(sum(counts[:3]) / 3, 2), round(sum(counts[3:6]) / 3, 2)]
        assert result["train_runtime"] == pytest.approx(7)
        assert result["train_samples_per_second"] == pytest.approx(sum(counts) / 7, abs=1e-3)
        assert result["train_steps_per_second"] == 1
        last = trainer.state.log_history[-1]
        assert last["train_samples_per_second"] == result["train_samples_per_second"]
    for entry in trainer.state.log_history:
        if "eval_runtime" in entry:
            asked = entry["eval_samples_per_second"] * entry["eval_runtime"]
            assert asked == pytest.approx(6, rel=0.05)


def test_validation_does_not_hang_on_the_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    batch = base.batch_paragraphs

    def spy(records: Any, size: int) -> Any:
        sizes.append(size)
        return batch(records, size)

    monkeypatch.setattr("llama_squad.training.setup.batch_paragraphs", spy)
    records = make_records(4, [3])
    encoded = {name: encoded_dataset(records) for name in ("train", "val")}
    encoder = ChatEncoder(tiny_tokenizer())
    args = SquadSFTConfig(output_dir=str(tmp_path), report_to="none", per_device_eval_batch_size=5)
    before = args.to_dict()

    def validate(dataset: dict[str, Any]) -> Any:
        return make_validation(args, dataset, str(tmp_path), encoder)

    layout = lay_out(TrainArguments(), args, encoded, tiny_model(), collator())
    assert validate({"val": Dataset.from_list(records)}) is not None
    assert sizes == [5]
    assert layout.settings["per_device_eval_batch_size"] == 1
    assert validate({}) is None
    assert args.to_dict() == before
    asked = args.replace(**layout.settings)
    assert asked.per_device_eval_batch_size == 1
    assert asked.eval_strategy == "steps"
    assert args.to_dict() == before
    layout = lay_out(TrainArguments(), args, {"train": encoded["train"]}, tiny_model(), collator())
    assert args.replace(**layout.settings).eval_strategy == "no"


# A whole epoch, on one process and on two --------------------------------------------------------


def real_records(count: int = 2000) -> Sequence[Record]:
    """Return the first questions of SQuAD or, where it is not here, of the quickstart's world."""
    squad = SHARED_DATA / "squad_v2" / "train-000.json"
    return (read_files([str(squad)]) if squad.is_file() else read_quickstart())[:count]


def epoch(encoded: Any, folder: Path) -> Recorder:
    """Go through the trainer's own batches of an epoch, and return what was seen."""
    model = tiny_model(hidden_size=8, num_hidden_layers=1)
    train, sft_args = planned(
        model, encoded, folder, per_device_train_batch_size=4, gradient_accumulation_steps=4
    )
    trainer = make_trainer(
        model, train, folder, max_steps=-1, num_train_epochs=1,
        train_sampling_strategy=sft_args.train_sampling_strategy,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=sft_args.gradient_accumulation_steps,
    )  # fmt: skip
    trainer.data_collator = seen = recorder()
    for _ in trainer.get_train_dataloader():
        pass
    return seen


@pytest.mark.slow
def test_an_epoch_of_real_questions(tmp_path: Path) -> None:
    encoded = encoded_dataset(real_records(), max_length=None)
    assert len(encoded) == 2000
    seen = epoch(encoded, tmp_path)
    assert Counter(seen.seen) == Counter(map(tuple, encoded["input_ids"]))
    assert seen.questions == 2000


TWO_PROCESSES = """
import json, os, sys
from pathlib import Path
import torch
from helpers import *
from llama_squad.training import trainer as training
from test_shared_contexts import epoch, planned, real_records, recorder, weights_after

folder = Path(sys.argv[1])
rank = int(os.environ["RANK"])
model = tiny_model()
encoded = encoded_dataset(make_records(4, [1, 3, 2, 2]))
train, sft_args = planned(model, encoded, folder / "run", per_device_train_batch_size=4)
assert sft_args.world_size == torch.distributed.get_world_size() == 2
trainer = make_trainer(
    model, train, folder / "run", per_device_train_batch_size=1, logging_steps=1,
    gradient_accumulation_steps=sft_args.gradient_accumulation_steps,
)
trainer.data_collator = seen = recorder()
weights = weights_after(trainer)
assert seen.questions < 8, "every process has all questions"
if rank == 0:
    log = trainer.state.log_history
trainer = make_trainer(
    model, train, folder / "run", per_device_train_batch_size=1, logging_steps=3, max_steps=6,
    gradient_accumulation_steps=sft_args.gradient_accumulation_steps, learning_rate=0.1,
)
counts = [[0, 0, 0], [0, 0, 0]]  # of the first three steps and the others
plain = training.answer_loss

def count(model, inputs, *options):
    loss, right, supervised = plain(model, inputs, *options)
    found = (int(right), int(supervised), int(inputs["counts"][:, 0].sum()))
    part = counts[trainer.state.global_step // 3]
    part[:] = [a + b for a, b in zip(part, found)]
    return loss, right, supervised

training.answer_loss = count
trainer.train()
training.answer_loss = plain
(folder / f"counts-{rank}.json").write_text(json.dumps(counts))
if rank == 0:
    figures = trainer.state.log_history
    torch.save({"weights": weights, "log": log, "figures": figures}, folder / "weights.pt")
encoded = encoded_dataset(real_records(500), max_length=None)
seen = epoch(encoded, folder / "run")
(folder / f"seen-{rank}.json").write_text(json.dumps(seen.seen))
"""


def python_path() -> dict[str, str]:
    """Return an environment in which a subprocess finds the package and the tests."""
    return os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"
    }  # fmt: skip


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path)],
        capture_output=True, text=True, env=python_path(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    saved = torch.load(tmp_path / "weights.pt")
    expected = one_step("plain", 8, 1, False, tmp_path)
    start = {name: weight.detach() for name, weight in tiny_model().named_parameters()}
    largest = max(float((w - start[n]).abs().max()) for n, w in expected.items())
    gap = max(float((saved["weights"][n] - w).abs().max()) for n, w in expected.items())
    assert gap < 1e-5 * largest
    log = saved["log"][0]
    trees = encoded_dataset(STEP)
    assert log["tokens_saved"] > 0.1
    assert log["num_tokens"] < sum(trees["length"])
    logs = saved["figures"]
    counts = [json.loads((tmp_path / f"counts-{rank}.json").read_text()) for rank in (0, 1)]
    for log, first, second in zip(logs, *counts, strict=False):  # three steps each
        right, supervised, questions = (a + b for a, b in zip(first, second, strict=True))
        assert log["mean_token_accuracy"] == right / supervised
        assert first[0] / first[1] != right / supervised, "one process would do"
        assert questions > first[2] > 0
    total = logs[-1]["train_samples_per_second"] * logs[-1]["train_runtime"]
    questions = sum(part[2] for rank in counts for part in rank)
    assert questions == 6 * 8
    assert total == pytest.approx(questions, rel=0.01)
    seconds = [3 * 8 / log["questions_per_second"] for log in logs[:2]]
    assert sum(seconds) == pytest.approx(logs[-1]["train_runtime"], rel=0.2)
    encoded = encoded_dataset(real_records(500), max_length=None)
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert abs(len(seen[0]) - len(seen[1])) < 50, "one process does most of the work"
    assert Counter(map(tuple, seen[0] + seen[1])) == Counter(map(tuple, encoded["input_ids"]))


# Killed and resumed ------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import train_llama_squad
from llama_squad.training.trainer import SquadTrainer

step, training_step = int(sys.argv[1]), SquadTrainer.training_step

def killed(self, *args, **kwargs):
    if self.state.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return training_step(self, *args, **kwargs)

SquadTrainer.training_step = killed
train_llama_squad.main(sys.argv[2:])
"""


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train_llama_squad

    monkeypatch.chdir(tmp_path)
    data = dataset_folder(tmp_path, make_records(20, [3, 2, 4]))
    flags = [
        "--model_name", model_folder(tmp_path), "--dataset_name", data, "--no_quantize",
        "--per_device_train_batch_size", "6", "--num_train_epochs", "2", "--learning_rate", "1e-2",
        "--save_steps", "3", "--report_to", "none", "--disable_tqdm", "True", "--lora_r", "4",
        "--lora_dropout", "0.1", "--lora_alpha", "8",
    ]  # fmt: skip
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "11", *flags, "--output_dir", "killed"],
        capture_output=True, text=True, env=python_path(), check=False,
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr[-3000:]
    assert (tmp_path / "killed/checkpoint-9").is_dir()
    assert not (tmp_path / "killed/final_checkpoints").exists()
    (tmp_path / "killed/checkpoint-12").mkdir()  # a save that was cut short is passed over
    train_llama_squad.main([*flags, "--output_dir", "killed", "--resume_from_checkpoint", "latest"])
    train_llama_squad.main([*flags, "--output_dir", "whole"])
    steps = [
        max(int(p.name[11:]) for p in (tmp_path / run).glob("checkpoint-*"))
        for run in ("killed", "whole")
    ]
    assert steps[0] == steps[1] > 12
    from safetensors.torch import load_file

    resumed, whole = (
        load_file(tmp_path / run / "final_checkpoints/adapter_model.safetensors")
        for run in ("killed", "whole")
    )
    assert max(float(weight.abs().max()) for weight in whole.values()) > 1e-2
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-7)
