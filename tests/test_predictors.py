"""An extractive encoder that answers, and the flags of those who are not a local chat model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import encoder_folder, make_records
from transformers import BertConfig, BertForQuestionAnswering, BertModel, PreTrainedTokenizerFast

import test_llama_squad
from llama_squad import modeling
from llama_squad.answers import format_answer
from llama_squad.arguments import CreateArguments, ModelArguments
from llama_squad.data import write_dataset
from llama_squad.predictors.extractive import ExtractiveModel
from llama_squad.result_reader import read_results

RECORDS = make_records(5, [2, 4], seed=3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 14 test questions on 5 paragraphs."""
    folder = str(tmp_path_factory.mktemp("predictors") / "data")
    splits = {"train": make_records(1, [1], 1), "val": make_records(1, [1], 2), "test": RECORDS}
    write_dataset(splits, CreateArguments(dataset_name=folder))
    return folder


# Flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--predictor=server", "--num_beams=2"], "--num_beams means nothing to"),
        (["--predictor=encoder", "--n_best=2"], "--n_best means nothing to --predictor encoder"),
        (["--predictor=encoder", "--decoding=free"], "--decoding free means nothing to"),
        (["--predictor=encoder", "--max_new_tokens=64"], "--max_new_tokens means nothing to"),
        (["--predictor=encoder", "--chat_template=x"], "--chat_template means nothing to"),
        (["--predictor=server", "--na_prob_thresh=0.3"], "--na_prob_thresh means nothing to"),
        (["--base_url=http://localhost"], "--base_url needs --predictor server"),
        (["--predictor=server", "--base_url=localhost:8000"], "is such as http://localhost:8000"),
        (["--predictor=server", "--base_url=http://localhost:port/v1"], "is such as"),
        (["--predictor=server", "--base_url=http://[::1/v1"], "is such as"),
        (["--predictor=server", "--base_url="], "is such as"),
        (["--predictor=server", "--base_url=http://h/v1/chat/completions"], "is such as"),
        (["--predictor=server", "--base_url=http://me:secret@localhost/v1"], "hold no secret"),
        (["--predictor=server", "--base_url=http://localhost/v1#secret"], "hold no secret"),
    ],
)
def test_flags_that_the_predictor_does_not_know(flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        test_llama_squad.main(flags)


# Encoders ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT of random weights, with a head for questions and a tokenizer of words."""
    return encoder_folder(tmp_path_factory.mktemp("reader"), RECORDS)


def load(folder: Path, **options: Any) -> tuple[ExtractiveModel, Any, Any]:
    """Load the reader; return its predictor, the model and the tokenizer."""
    model = BertForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return ExtractiveModel(model, tokenizer, **options), model, tokenizer


def search(model: Any, tokenizer: Any, record: dict[str, Any]) -> tuple[str, float, float]:
    """Try all spans of up to 30 tokens, one record at a time: the text, its score, no answer's."""
    inputs = tokenizer(
        record["question"], record["context"], return_offsets_mapping=True, return_tensors="pt"
    )
    offsets = inputs.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        output = model(**inputs)
    starts, ends = output.start_logits[0].tolist(), output.end_logits[0].tolist()
    inside = [index for index, part in enumerate(inputs.sequence_ids(0)) if part == 1]
    score, first, last = max(
        (starts[i] + ends[j], i, j) for i in inside for j in inside if i <= j < i + 30
    )
    text = record["context"][offsets[first][0] : offsets[last][1]]
    return text, score, starts[0] + ends[0]


class Scorer(torch.nn.Module):
    """Gives a token one score, as the first and as the last one of a span."""

    device, config = torch.device("cpu"), BertConfig()

    def __init__(self, score: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.score = score

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        """Score [windows, length] tokens."""
        logits = self.score(input_ids).expand(input_ids.shape)
        return type("Output", (), {"start_logits": logits, "end_logits": logits})


def test_encoder_finds_the_best_span(reader: Path) -> None:
    encoder, model, tokenizer = load(reader, window=500, na_prob_thresh=1.0, batch_size=3)
    predictions = encoder.answer([RECORDS[:2], RECORDS[2:]])
    assert [prediction.record["id"] for prediction in predictions] == [r["id"] for r in RECORDS]
    for prediction, record in zip(predictions, RECORDS, strict=True):
        text, score, nothing = search(model, tokenizer, record)
        assert prediction.reply.completion == format_answer(text)
        assert prediction.reply.score == pytest.approx(score, abs=1e-4)
        expected = torch.tensor(nothing - score).sigmoid().item()
        assert prediction.reply.na_prob == pytest.approx(expected, abs=1e-4)


def test_encoder_abstains_above_its_threshold(reader: Path) -> None:
    found = load(reader)[0].answer([RECORDS])
    chances = {p.record["id"]: p.reply.na_prob for p in found if p.reply.na_prob is not None}
    middle = sorted(chances.values())[len(RECORDS) // 2]
    for prediction in load(reader, na_prob_thresh=middle)[0].answer([RECORDS]):
        abstained = prediction.reply.completion == format_answer("?")
        assert abstained == (chances[prediction.record["id"]] > middle)


def test_encoder_reads_contexts_longer_than_its_window(reader: Path) -> None:
    """The end of the context, of which no other window has a thing, decides."""
    _, _, tokenizer = load(reader)
    wanted = tokenizer.convert_tokens_to_ids("zebra")
    assert wanted == tokenizer.unk_token_id
    model: Any = Scorer(lambda ids: (ids == wanted).float())
    encoder = ExtractiveModel(model, tokenizer, 1.0, window=48, stride=8)
    record = RECORDS[0] | {"context": RECORDS[0]["context"] * 3 + " zebra"}
    record["question"] = "met"
    reply = encoder.answer([[record]])[0].reply
    assert reply.completion == format_answer("zebra")


@pytest.mark.parametrize(("positions", "length"), [(512, 10**30), (64, 10**30), (512, 60)])
def test_encoder_cuts_long_questions_and_windows(reader: Path, positions: int, length: int) -> None:
    _, model, tokenizer = load(reader)
    tokenizer.model_max_length = length
    model.config.max_position_embeddings = positions
    model.bert.embeddings.position_embeddings.weight.data[min(positions, length) :] = float("nan")
    encoder = ExtractiveModel(model, tokenizer, na_prob_thresh=1.0)
    record = RECORDS[0] | {"context": RECORDS[0]["context"] * 5, "question": "met " * 600}
    reply = encoder.answer([[record]])[0].reply
    assert reply.best
    assert reply.best.text in record["context"]
    assert reply.na_prob == reply.na_prob  # not NaN: no position was beyond the model's


def test_encoder_that_reads_too_little_is_refused(reader: Path) -> None:
    _, model, tokenizer = load(reader)
    model.config.max_position_embeddings = -1  # XLNet's
    with pytest.raises(ValueError, match="bert is no encoder for this"):
        ExtractiveModel(model, tokenizer)


def test_encoder_is_held_in_float32_unasked(reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling, "resolve_dtype", lambda _: torch.bfloat16)
    args = ModelArguments(model_name=str(reader))
    assert modeling.load_reader(args)[0].dtype == torch.float32
    asked = ModelArguments(model_name=str(reader), dtype="bfloat16")
    assert modeling.load_reader(asked)[0].dtype == torch.bfloat16


def test_encoder_gives_no_empty_span_and_no_question_mark(reader: Path) -> None:
    """Whatever their scores: here special tokens and the question have the highest, then "?"."""
    _, _, tokenizer = load(reader)
    mark = tokenizer.convert_tokens_to_ids("?")
    model: Any = Scorer(
        lambda ids: 9 - 4.0 * (torch.arange(ids.shape[1]) > 3) - (ids != mark) * 1.0
    )
    encoder = ExtractiveModel(model, tokenizer, 1.0)
    for context, best in (("? met", "? met"), ("?", None)):
        record = {"id": "1", "question": "met", "context": context}
        reply = encoder.answer([[record]])[0].reply
        assert (reply.best.text if reply.best else None) == best
        assert reply.completion == format_answer(best or "?")


def test_encoder_through_the_command_line(reader: Path, dataset: str, tmp_path: Path) -> None:
    output = tmp_path / "results.csv"
    test_llama_squad.main(
        ["--predictor", "encoder", "--model_name", str(reader), "--dataset_name", dataset,
         "--output", str(output), "--na_prob_thresh", "1"]
    )  # fmt: skip
    rows = read_results(output)
    assert len(rows) == len(RECORDS)
    for row, record in zip(rows, RECORDS, strict=True):
        assert row["prediction_text"]
        assert row["prediction_text"] in record["context"]
        assert row["na_prob"] is not None
        assert 0 <= row["na_prob"] <= 1


def test_encoder_without_a_head_is_refused(reader: Path, dataset: str, tmp_path: Path) -> None:
    PreTrainedTokenizerFast.from_pretrained(reader).save_pretrained(tmp_path)
    BertModel(BertConfig.from_pretrained(reader)).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="was not trained to answer questions"):
        test_llama_squad.main(
            ["--predictor", "encoder", "--model_name", str(tmp_path), "--dataset_name", dataset]
        )
