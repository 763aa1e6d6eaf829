"""Words of filler before the answer: no token attends to them, in training, decoding and chat."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    collator,
    flatten,
    gaps,
    make_records,
    outcome,
    tiny_model,
    tiny_tokenizer,
    training_flags,
)

import train_llama_squad
from llama_squad import modeling, weights
from llama_squad.arguments import AppArguments, ModelArguments
from llama_squad.decoding.chat import ChatSession
from llama_squad.decoding.spans import span_vocabulary
from llama_squad.encoding import IGNORE, ChatEncoder
from llama_squad.predictors.local import LocalModel
from llama_squad.prompts import build_messages
from llama_squad.reader import Reader
from llama_squad.training.setup import check_shared_contexts
from llama_squad.tree import Tree

RECORDS = make_records(3, [3, 1, 2])
RESERVED = tiny_tokenizer().added_tokens_encoder["<|reserved_special_token_0|>"]


def encoder(reasoning_tokens: int = 0, filler: int = 3) -> ChatEncoder:
    """Return an encoder with filler."""
    return ChatEncoder(tiny_tokenizer(), reasoning_tokens, RESERVED, filler)


def paragraphs(reasoning_tokens: int = 0) -> list[list[dict[str, Any]]]:
    """Encode records, grouped by their context."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    examples = encoder(reasoning_tokens).encode([build_messages(r) for r in RECORDS])
    for record, example in zip(RECORDS, examples, strict=True):
        grouped.setdefault(record["context"], []).append(example)
    return list(grouped.values())


@torch.no_grad()
def without_mask(model: Any, ids: Sequence[int], hidden: range, reasoning: int = 0) -> torch.Tensor:
    """Return the logits from the last token before the reply on, without any tree.

    The filler itself is not there: the tokens after it stand at their own positions, and the last
    word of filler is run apart, on the prompt alone.
    """
    prompt, rest = list(ids[: hidden.start]), list(ids[hidden.stop :])
    where = [*range(hidden.start), *range(hidden.stop, len(ids))]
    mask = torch.ones(1, len(where), dtype=torch.long)
    tokens, positions = torch.tensor([prompt + rest]), torch.tensor([where])
    logits = model(tokens, attention_mask=mask, position_ids=positions).logits[0]
    if reasoning:
        return logits[hidden.start + reasoning - 1 :]
    apart = torch.tensor([[*prompt, ids[hidden.stop - 1]]])
    place = torch.tensor([[*range(hidden.start), hidden.stop - 1]])
    first = model(apart, attention_mask=torch.ones_like(apart), position_ids=place).logits[0, -1:]
    return torch.cat([first, logits[hidden.start :]])


def reply_start(example: dict[str, Any]) -> int:
    """Return the index of a reply's first token."""
    return next(i for i, label in enumerate(example["labels"]) if label != IGNORE)


def test_literal_rows() -> None:
    examples = [
        {"input_ids": [5, 6, *tail], "labels": [IGNORE] * 4 + tail[2:], "hidden": [2, 4]}
        for tail in ([9, 9, 1, 2], [9, 9, 3])
    ]
    tree = Tree.build([examples])
    assert tree.input_ids == [5, 6, 9, 9, 1, 2, 9, 9, 3]
    assert tree.position_ids == [0, 1, 2, 3, 4, 5, 2, 3, 4]
    assert tree.ends == [9, 9, 3, 4, 6, 6, 7, 8, 9]


def test_the_filler_stands_before_reasoning_and_reply() -> None:
    encode = encoder(reasoning_tokens=2)
    plain, padded = (
        e.encode([build_messages(RECORDS[0])])[0] for e in (ChatEncoder(tiny_tokenizer()), encode)
    )
    start = reply_start(plain)
    words = tiny_tokenizer().encode(" blah blah blah", add_special_tokens=False)
    assert padded["input_ids"] == [
        *plain["input_ids"][:start], *words, RESERVED, RESERVED, *plain["input_ids"][start:],
    ]  # fmt: skip
    assert padded["hidden"] == [start, start + len(words)]
    assert padded["labels"][start:] == [IGNORE] * (len(words) + 2) + plain["labels"][start:]
    (prompt,) = encode.encode_prompts([build_messages(RECORDS[0], answer=False)])
    assert prompt == padded["input_ids"][: start + len(words) + 2]
    assert encode.filler_of(prompt) == range(*padded["hidden"])


@pytest.mark.parametrize("reasoning_tokens", [0, 2])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_rows_equal_separate_examples(architecture: str, reasoning_tokens: int) -> None:
    model, groups = tiny_model(architecture), paragraphs(reasoning_tokens)
    separate = [collator()([example]) for example in flatten(groups)]
    assert {batch["attention_mask"].dim() for batch in separate} == {4}
    ways = [
        [collator()([{"paragraphs": groups}])],
        [collator()([{"paragraphs": groups[:2]}, {"paragraphs": groups[2:]}])],
        [collator()(flatten(groups))],
    ]
    expected = outcome(model, separate)
    for batches in ways:
        assert max(gaps(outcome(model, batches), expected).values()) < 1e-5


@pytest.mark.parametrize("reasoning_tokens", [0, 2])
def test_it_is_as_if_the_filler_were_not_there(reasoning_tokens: int) -> None:
    model = tiny_model()
    for example in flatten(paragraphs(reasoning_tokens)):
        batch, first = collator()([example]), reply_start(example)
        del batch["labels"]
        ids, hidden = example["input_ids"], range(*example["hidden"])
        found = model(**batch).logits[0, first - 1 :]
        expected = without_mask(model, ids, hidden, reasoning_tokens)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        seen = model(torch.tensor([ids])).logits[0, first - 1 :]
        assert (seen - expected).abs().max() > 1e-2, "attended to, it would be the same"


def test_the_check_of_shared_contexts_takes_filler() -> None:
    assert check_shared_contexts(tiny_model(), collator(), {"paragraphs": paragraphs()}) == ""


@pytest.mark.parametrize("reasoning_tokens", [0, 2])
def test_evaluation(reasoning_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encode = tiny_model(), encoder(reasoning_tokens)
    examples = encode.encode([build_messages(r) for r in RECORDS])
    batch = [RECORDS[:3], RECORDS[3:4], RECORDS[4:]]
    for alone in (1024, 8):
        monkeypatch.setattr("llama_squad.decoding.batch.STEM_ALONE", alone)
        for options in ({"decoding": "free", "max_new_tokens": 6}, {"decoding": "span"}):
            local = LocalModel(model, encode, **options)
            for example, prediction in zip(examples, local.answer(batch), strict=True):
                reply, first = prediction.reply, reply_start(example)
                ids = [*example["input_ids"][:first], *reply.token_ids]
                hidden = range(*example["hidden"])
                logits = without_mask(model, ids, hidden, reasoning_tokens)[:-1]
                scores = logits.log_softmax(-1)[range(len(reply.token_ids)), reply.token_ids]
                free = options["decoding"] == "free"
                header = 0 if free else len(span_vocabulary(encode).header)
                assert reply.score == pytest.approx(float(scores[header:].sum()), abs=1e-4)
                if free:
                    assert reply.token_ids == logits.argmax(-1).tolist()


@pytest.mark.parametrize("reasoning_tokens", [0, 2])
def test_the_demo(reasoning_tokens: int) -> None:
    model, encode = tiny_model(), encoder(reasoning_tokens)
    session = ChatSession(model, encode, AppArguments(max_new_tokens=6))
    plain = ChatSession(model, ChatEncoder(tiny_tokenizer()), AppArguments(max_new_tokens=6))
    local = LocalModel(model, encode, decoding="free", max_new_tokens=6)
    for record in RECORDS:
        *_, said = session.ask(record["context"], record["question"])
        reply = local.answer([[record]])[0].reply
        assert said[-1]["content"] == reply.completion.strip()
    *_, said = session.converse([], ["Hello, who are you?"])
    *_, expected = plain.converse([], ["Hello, who are you?"])
    assert said == expected


def test_the_demo_with_windows_shorter_than_a_prompt() -> None:
    session = ChatSession(
        tiny_model("gemma3_text", sliding_window=64), encoder(), AppArguments(max_new_tokens=6)
    )
    *_, said = session.ask(RECORDS[0]["context"], RECORDS[0]["question"])
    assert said[-1]["role"] == "assistant"


@pytest.mark.slow
def test_the_stage(tmp_path: Path, offline: None) -> None:
    flags = training_flags(
        tmp_path, "--no_quantize", "--max_steps", "2", "--eval_steps", "2", "--lora_r", "4",
        "--filler", "2", val=RECORDS[:3],
    )  # fmt: skip
    for more in ([], ["--no_share_context"]):
        train_llama_squad.main([*flags, *more])
    folder = str(tmp_path / "results" / "final_checkpoints")
    assert weights.saved_settings(folder)["filler"] == 2
    model = modeling.load_model(ModelArguments(model_name=flags[1]), adapter_name=folder).eval()
    scores = [
        LocalModel(model, encoder(filler=words)).answer([RECORDS[:1]])[0].reply.score
        for words in (2, 0)
    ]
    reader = Reader(folder, num_beams=1)
    found = reader(RECORDS[0]["question"], RECORDS[0]["context"]).score
    assert found == pytest.approx(scores[0], abs=1e-4)
    assert found != pytest.approx(scores[1], abs=1e-4)
    with pytest.raises(SystemExit, match="--filler must be at least 0"):
        train_llama_squad.main([*flags[:-1], "-1"])
