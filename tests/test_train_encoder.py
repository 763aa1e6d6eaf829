"""An encoder is trained beside the chat model: its windows, its run, and that evaluation takes it."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import train_encoder
from helpers import encoder_folder, make_records, training_flags
from trained_on import trained_on
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, TrainerCallback

import train_llama_squad
from llama_squad import modeling
from llama_squad.arguments import CreateArguments, ModelArguments
from llama_squad.data import load_squad, write_dataset
from llama_squad.predictors.extractive import ExtractiveModel
from llama_squad.training.trainer import SquadTrainer

RECORDS = make_records(6, [2, 4], seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder in "base", and a dataset of 18 training questions in "data"."""
    root = tmp_path_factory.mktemp("encoder")
    encoder_folder(root / "base", RECORDS)
    splits = {"train": RECORDS, "test": make_records(2, [3], seed=4)}
    write_dataset(splits, CreateArguments(dataset_name=str(root / "data")))
    return root


# Windows -------------------------------------------------------------------------------------


def marked(window: dict[str, Any], tokenizer: Any) -> str:
    ids = window["input_ids"][window["start_positions"] : window["end_positions"] + 1]
    return str(tokenizer.decode(ids)).replace(" ", "")


def test_windows_mark_the_first_answer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    found = train_encoder.windows(tokenizer, RECORDS)
    assert len(found) == len(RECORDS)
    for window, record in zip(found, RECORDS, strict=True):
        assert set(window) == {*tokenizer.model_input_names, "start_positions", "end_positions"}
        golds = record["answers"]["text"]
        assert marked(window, tokenizer) == (golds[0] if golds else "[CLS]")
        # in the context, though the question may name it
        question = window["input_ids"].index(tokenizer.sep_token_id)
        assert not golds or window["start_positions"] > question


def test_a_long_context_is_read_in_windows(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    context = " ".join(record["context"] for record in RECORDS) + " Zzz was last."
    answers = {"text": ["Zzz"], "answer_start": [context.index("Zzz")]}
    record = {"question": "Who was last? " * 100, "context": context, "answers": answers}
    found = train_encoder.windows(tokenizer, [record])
    assert len(found) > 3
    assert all(len(window["input_ids"]) <= train_encoder.WINDOW for window in found)
    assert [marked(window, tokenizer) for window in found[:-1]] == ["[CLS]"] * (len(found) - 1)
    assert found[-1]["start_positions"] > train_encoder.QUESTION
    assert found[0]["input_ids"].index(tokenizer.sep_token_id) == train_encoder.QUESTION + 1


# The run -------------------------------------------------------------------------------------


def train(folder: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    """Train for five steps; return the weights."""
    train_encoder.main([
        f"--model={folder}/base", f"--dataset_name={folder}/data", f"--output_dir={out}",
        "--batch_size=4", "--save_steps=2", "--questions=17", *more,
    ])  # fmt: skip
    return AutoModelForQuestionAnswering.from_pretrained(out).state_dict()


class Stop(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 3:
            raise InterruptedError


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole = train(folder, tmp_path / "whole")
    assert "17 questions in 17 windows" in capsys.readouterr().out
    base = AutoModelForQuestionAnswering.from_pretrained(folder / "base").state_dict()
    assert not torch.equal(whole["qa_outputs.weight"], base["qa_outputs.weight"])
    with monkeypatch.context() as patch:
        trainer = train_encoder.Trainer
        patch.setattr(train_encoder, "Trainer", lambda **o: trainer(**o, callbacks=[Stop()]))
        with pytest.raises(InterruptedError):
            train(folder, tmp_path / "stopped")
    capsys.readouterr()
    (tmp_path / "stopped" / "checkpoint-4").mkdir()  # killed while it was written
    with pytest.raises(SystemExit, match="checkpoint-2 was made with another --learning_rate"):
        train(folder, tmp_path / "stopped", "--learning_rate", "1e-5")
    resumed = train(folder, tmp_path / "stopped")
    assert "\n10 questions in" in capsys.readouterr().out  # 3 of 5 steps
    for name, weights in whole.items():
        torch.testing.assert_close(resumed[name], weights, rtol=0, atol=1e-6, msg=name)


def test_faults_of_the_user(folder: Path) -> None:
    for flags, message in (
        ([f"--model={folder}/none"], "train_encoder.py: .*none"),
        ([f"--model={folder}/base", f"--dataset_name={folder}/none"], "train_encoder.py: .*none"),
        (
            [f"--model={folder}/base", f"--dataset_name={folder}/data", f"--questions_of={folder}"],
            f"train_encoder.py: {folder} does not say what it was trained on",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            train_encoder.main(flags)


@pytest.mark.parametrize(
    ("steps", "more"),
    [(3, []), (3, ["--loss_on", "all"]), (9, [])],  # 9: more than an epoch
)
def test_the_questions_are_those_that_an_adapter_has_seen(
    steps: int, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[tuple[str, int]] = []  # text and number of questions
    compute = SquadTrainer.compute_loss

    def watch(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        texts = self.processing_class.batch_decode(inputs["input_ids"])
        rows.extend(zip(texts, inputs["counts"][:, 0].tolist(), strict=True))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SquadTrainer, "compute_loss", watch)
    flags = ["--no_quantize", "--max_steps", str(steps), "--per_device_train_batch_size", "2"]
    train_llama_squad.main(training_flags(tmp_path, *flags, "--logging_steps", "2", *more))
    split = load_squad(str(tmp_path / "dataset"))["train"]
    seen = trained_on("results/final_checkpoints", split)
    assert len(seen) == len({*seen}) == min(sum(count for _, count in rows), 15)
    places = iter(seen)
    for text, count in rows[:6]:
        for record in split.select([*itertools.islice(places, count)]):
            assert record["context"] in text
            assert record["question"][-7:] in text  # they share how they begin
    assert not [*places]
    if steps == 3 and not more:
        with pytest.raises(ValueError, match="of another dataset"):
            trained_on("results/final_checkpoints", split.select(range(2, 15)))
        config = Path("results/final_checkpoints/llama_squad.json")
        saved = json.loads(config.read_text())
        saved["figures"]["num_tokens"] += 1
        config.write_text(json.dumps(saved))
        with pytest.raises(ValueError, match="drawn in another order"):
            trained_on("results/final_checkpoints", split)


def test_evaluation_takes_what_was_trained(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "out")
    settings = ModelArguments(model_name=str(tmp_path / "out"))
    reader = ExtractiveModel(*modeling.load_reader(settings))
    for prediction in reader.answer([RECORDS[:2]]):
        assert 0 < (prediction.reply.na_prob or 0) < 1
