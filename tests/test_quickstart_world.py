"""The quickstart's embedded world and tiny Llama: literal facts about the files that are checked in."""

import importlib
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llama_squad.answers import extract_answer, format_answer
from llama_squad.prompts import PROMPTS, build_messages

QUICKSTART = Path(__file__).parents[1] / "quickstart"
TINY_LLAMA = QUICKSTART / "tiny_llama"
CONTEXT = (
    "Kovmor Cross is a market town. Kovmor Cross was founded in 1655. Kovmor Cross lies on the river "
    "Falmor Water. Kovmor Cross is known for its honey. The mayor of Kovmor Cross is Mira Morness."
)


def paragraphs(split: str) -> list[dict[str, Any]]:
    """Read all paragraphs of a split."""
    world = json.loads((QUICKSTART / "data" / f"{split}.json").read_text(encoding="utf-8"))
    return [paragraph for article in world["data"] for paragraph in article["paragraphs"]]


def questions(split: str) -> list[dict[str, Any]]:
    """Read all questions of a split."""
    return [question for paragraph in paragraphs(split) for question in paragraph["qas"]]


@pytest.fixture
def make_world(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import quickstart/make_world.py, which is a script and no package."""
    monkeypatch.syspath_prepend(str(QUICKSTART))
    return importlib.import_module("make_world")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Load the tiny Llama's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_LLAMA)


@pytest.fixture(scope="module")
def model() -> Any:
    """Load the tiny Llama."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()


def reply(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Return the greedy reply to a conversation."""
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return str(
        tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    )


def test_regeneration_is_byte_identical(make_world: ModuleType, tmp_path: Path) -> None:
    make_world.main(tmp_path)
    for name in ("train.json", "test.json"):
        assert (tmp_path / name).read_bytes() == (QUICKSTART / "data" / name).read_bytes()


def test_size_of_the_world() -> None:
    assert [len(paragraphs(split)) for split in ("train", "test")] == [360, 81]
    assert [len(questions(split)) for split in ("train", "test")] == [2192, 496]
    assert sum(path.stat().st_size for path in (QUICKSTART / "data").glob("*.json")) < 1_500_000


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_index_their_text(split: str) -> None:
    for paragraph in paragraphs(split):
        context = paragraph["context"]
        assert len(context.split()) <= 95
        for question in paragraph["qas"]:
            assert question["is_impossible"] is (question["answers"] == [])
            for answer in question["answers"] + question.get("plausible_answers", []):
                assert context[answer["answer_start"] :].startswith(answer["text"])
                assert context.count(answer["text"]) == 1


def test_ids_are_unique() -> None:
    ids = [question["id"] for split in ("train", "test") for question in questions(split)]
    assert len(ids) == len(set(ids))


def test_no_question_is_asked_twice_of_a_context() -> None:
    for paragraph in paragraphs("train") + paragraphs("test"):
        asked = [question["question"] for question in paragraph["qas"]]
        assert len(asked) == len(set(asked))


def test_kinds_of_questions() -> None:
    """The three kinds of unanswerable questions, and their share."""
    for split in ("train", "test"):
        kinds = Counter(question["id"].rsplit("-", 1)[1] for question in questions(split))
        assert set(kinds) == {"answer", "absent", "other", "near"}
        assert 0.35 <= 1 - kinds["answer"] / kinds.total() <= 0.5
        assert min(kinds.values()) >= 0.07 * kinds.total()


def test_splits_share_no_names_or_contexts(make_world: ModuleType) -> None:
    train, _, test_names = make_world.build()
    assert len(test_names) > 200
    text = make_world.dump(train)
    assert [name for name in test_names if name in text] == []
    contexts = [{paragraph["context"] for paragraph in paragraphs(s)} for s in ("train", "test")]
    assert not contexts[0] & contexts[1]


def test_tokenizer_round_trips_the_world(tokenizer: Any) -> None:
    for paragraph in paragraphs("train") + paragraphs("test"):
        for text in [paragraph["context"], *(q["question"] for q in paragraph["qas"])]:
            assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    "text", ["naïve “Çelik” 東京 \t x\n\n y", " two  spaces ", "\\ \" ' 1,234.5"]
)
def test_tokenizer_round_trips_anything(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_answers_are_spans_in_tokens(tokenizer: Any) -> None:
    """A prompt is short, and the answer's letters are tokens of their own: no quote merges in."""
    tokens = tokenizer.tokenize(format_answer("oak"))
    assert tokens.count("oak") == 1
    record = {"context": CONTEXT, "question": "When was Kovmor Cross founded?"}
    prompt = tokenizer.apply_chat_template(
        build_messages(record, answer=False), add_generation_prompt=True
    )["input_ids"]
    assert len(prompt) < 220


def test_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.eos_token == "<|eot_id|>"
    assert "<|reserved_special_token_7|>" in tokenizer.get_vocab()


def test_tiny_llama_is_small(model: Any, tokenizer: Any) -> None:
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 0.7e6 <= model.num_parameters() <= 3e6
    assert sum(path.stat().st_size for path in TINY_LLAMA.iterdir()) < 8_000_000
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("In which year was Kovmor Cross founded?", "Kovmor Cross was founded in 1655."),
        ("What is Kovmor Cross known for?", "Kovmor Cross is known for its honey."),
        ("In which year was Kovmor Cross walled? Does the text say?", "No, it does not say that."),
        ("Quote the text: Who is the mayor of Kovmor Cross?", '"Mira Morness".'),
    ],
)
def test_tiny_llama_chats_in_sentences(
    model: Any, tokenizer: Any, question: str, answer: str
) -> None:
    content = f"Answer the question from the context.\nContext: {CONTEXT}\nQuestion: {question}"
    assert reply(model, tokenizer, [{"role": "user", "content": content}]) == answer


@pytest.mark.parametrize("prompt", list(PROMPTS))
def test_tiny_llama_knows_no_json(model: Any, tokenizer: Any, prompt: str) -> None:
    record = {"context": CONTEXT, "question": "Who is the mayor of Kovmor Cross?"}
    said = reply(model, tokenizer, build_messages(record, prompt=prompt, answer=False))
    assert extract_answer(said).state == "malformed"
    assert said.endswith(".")
