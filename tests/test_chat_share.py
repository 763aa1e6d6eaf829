"""Plain chat in training: the base's own replies, made once, and a share of the conversations."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import encoded_dataset, make_records, tiny_model, tiny_tokenizer, training_flags

import train_llama_squad
from llama_squad.arguments import ModelArguments, TrainArguments
from llama_squad.chat_check import CHAT_PROMPTS, read_prompts
from llama_squad.encoding import IGNORE, ChatEncoder
from llama_squad.prompts import SYSTEM_PROMPT, build_messages
from llama_squad.training import chat_share
from llama_squad.training.chat_share import (
    REPLY_TOKENS,
    TRAINING_PROMPTS,
    add_chat,
    chat_conversations,
    chat_examples,
)
from llama_squad.training.examples import encode_split
from llama_squad.tree import Tree

ENCODER = ChatEncoder(tiny_tokenizer())
END = tiny_tokenizer().eos_token_id


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Chat about little, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "prompts.txt"
    file.write_text("Hi!\nWho are you?\nWhat is rain?\nHow far?\nWhy?\n")
    monkeypatch.setattr(chat_share, "TRAINING_PROMPTS", file)
    monkeypatch.setattr(chat_share, "REPLY_TOKENS", 6)
    monkeypatch.setattr(chat_share, "BATCH", 2)
    return file


def make(model: Any, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Make the examples for a dataset in ``folder``."""
    args = TrainArguments(dataset_name=str(folder / "data"), quantize=False)
    model_args = ModelArguments(model_name=options.pop("model_name", "tiny"))
    return chat_examples(model, ENCODER, args, model_args, options.pop("system_prompt", ""))


def test_the_bundled_prompts_are_not_those_of_the_check() -> None:
    ours, checked = (
        {"".join(filter(str.isalnum, prompt.casefold())) for prompt in read_prompts(path)}
        for path in (TRAINING_PROMPTS, CHAT_PROMPTS)
    )
    assert len(ours) == len(read_prompts(TRAINING_PROMPTS)) >= 200
    assert not ours & checked
    assert REPLY_TOKENS == 128


def test_examples_are_the_bases_greedy_replies(tmp_path: Path) -> None:
    model = tiny_model()
    conversations = chat_conversations("Be brief.")
    assert [m["role"] for c in conversations for m in c] == [
        *["user"], *["system", "user"], *["user"], *["system", "user"], *["user"],
    ]  # fmt: skip
    prompts = ENCODER.encode_prompts(conversations, final=False)
    examples = make(model, tmp_path, system_prompt="Be brief.")
    assert len(examples) == 5
    for prompt, example in zip(prompts, examples, strict=True):
        ids, labels = example["input_ids"], example["labels"]
        assert ids[: len(prompt)] == prompt
        assert labels == [IGNORE] * len(prompt) + ids[len(prompt) :]
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        reply = ids[len(prompt) :]
        said = reply[:-1] if len(reply) < 6 or reply[-1] == END else reply
        assert said == best[len(prompt) - 1 :][: len(said)]
        assert len(said) == 6 or reply[-1] == END


def test_an_end_of_turn_is_trained_where_the_base_ends_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [tiny_tokenizer().encode(word, add_special_tokens=False)[0] for word in "abcdefgh"]
    looping = tiny_tokenizer().encode("no " * 20, add_special_tokens=False)
    # of two words, of none; of as many as there may be, of one; a loop
    replies = iter([[words[:2], []], [words[2:8], words[:1]], [looping]])
    monkeypatch.setattr(chat_share, "answer_greedily", lambda *_: next(replies))
    examples = make(tiny_model(), tmp_path)
    labels = [[i for i in e["labels"] if i != IGNORE] for e in examples]
    assert labels == [[*words[:2], END], words[2:8], [words[0], END]]


def test_replies_are_made_once_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = chat_share.answer_greedily
    asked = []

    def stopped(model: Any, encoder: Any, prompts: Any, tokens: int) -> Any:
        asked.append(len(prompts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return made(model, encoder, prompts, tokens)

    monkeypatch.setattr(chat_share, "answer_greedily", stopped)
    with pytest.raises(KeyboardInterrupt):
        make(tiny_model(), tmp_path)
    examples = make(tiny_model(), tmp_path)
    assert asked == [2, 2, 2, 1]
    assert make(tiny_model(), tmp_path) == examples
    assert asked == [2, 2, 2, 1]
    (file,) = tmp_path.glob("data.chat-*.json")
    content = json.loads(file.read_text())
    assert content["made_from"]["conversations"][1] == [{"role": "user", "content": "Who are you?"}]
    whole = tiny_tokenizer().decode([i for i in examples[0]["labels"] if i not in (IGNORE, END)])
    assert content["replies"][0]["reply"] == whole
    make(tiny_model(), tmp_path, model_name="other")
    assert asked == [2, 2, 2, 1, 2, 2, 1]
    file.write_text("{")
    with pytest.raises(ValueError, match=r"data\.chat-.*\.json is damaged .*delete it"):
        make(tiny_model(), tmp_path)


def test_the_share(tmp_path: Path) -> None:
    encoded = encoded_dataset(make_records(4, [3]))
    examples = make(tiny_model(), tmp_path)
    mixed = add_chat(encoded, examples, 0.4, 4096, seed=1)
    assert len(mixed) == 12 + 8
    assert mixed[:12]["input_ids"] == encoded["input_ids"]
    chats = Counter(map(tuple, mixed[12:]["input_ids"]))
    assert sorted(chats.values()) == [1, 1, 2, 2, 2]
    assert {*chats} == {tuple(e["input_ids"]) for e in examples}
    assert len(set(mixed["paragraph"])) == 4 + 8
    assert [len(ids) for ids in mixed["input_ids"]] == mixed["length"]
    assert len(add_chat(encoded, examples, 0.01, 4096, seed=1)) == 12
    with pytest.raises(ValueError, match="no reply to plain prompts that fits into 3 tokens"):
        add_chat(encoded, examples, 0.4, 3, seed=1)


@pytest.mark.parametrize("more", [[], ["--no_share_context"]])
def test_chat_has_no_filler(more: list[str], tmp_path: Path) -> None:
    flags = ["--no_quantize", "--max_steps", "1", "--filler", "3", "--chat_share", "0.5"]
    train_llama_squad.main(training_flags(tmp_path, *flags, *more))
    encoder = ChatEncoder(tiny_tokenizer(), filler=3)
    records = make_records(4, [3])
    split = Dataset.from_list([{**r, "messages": build_messages(r)} for r in records])
    encoded, _ = encode_split(split, encoder, 4096, "test")
    mixed = add_chat(encoded, make(tiny_model(), tmp_path), 0.4, 4096, seed=1)
    assert mixed[:12]["hidden"] == encoded["hidden"]
    for row in mixed.select(range(12, 20)):
        tree = Tree.build([[row], [mixed[0]]])
        causal = [len(row["input_ids"])] * len(row["input_ids"])
        assert (
            tree.ends[tree.leaves[0].start : tree.leaves[0].stop]
            == (causal[tree.leaves[0].start : tree.leaves[0].stop])
        )


@pytest.mark.parametrize("more", [[], ["--no_share_context"], ["--full_parameters"]])
def test_the_stage(more: list[str], tmp_path: Path, few_prompts: Path, capsys: Any) -> None:
    adapter = [] if more == ["--full_parameters"] else ["--no_quantize", "--lora_dropout", "0"]
    flags = training_flags(
        tmp_path, "--max_steps", "4", "--save_steps", "2", "--learning_rate", "1e-2",
        "--chat_share", "0.5", *adapter, *more,
    )  # fmt: skip
    train_llama_squad.main(flags)
    (file,) = tmp_path.glob("dataset.chat-*.json")
    replies = [entry["ids"] for entry in json.loads(file.read_text())["replies"]]
    prompts = ENCODER.encode_prompts(chat_conversations(SYSTEM_PROMPT), final=False)
    pairs = zip(prompts, replies, strict=True)
    chat = sum(len(prompt) + min(6, len(reply) + 1) for prompt, reply in pairs)
    total = sum(encoded_dataset(make_records(6, [2, 3]))["length"]) + 3 * chat  # 15 and 15
    said = capsys.readouterr().out
    assert f"tokens per epoch instead of {total:,}" in said or "--no_share_context" in more
    # the run goes on from its checkpoint, but not with other chat
    again = [*flags, "--resume_from_checkpoint", "results/checkpoint-2"]
    train_llama_squad.main(again)
    few_prompts.write_text("Hi!\nAnother?\n")
    with pytest.raises(SystemExit, match=r"chat: '\w+' in the checkpoint, '\w+' now"):
        train_llama_squad.main(again)


def test_a_bad_share_is_refused() -> None:
    for share, more, message in (
        ("1", [], "--chat_share must be at least 0 and below 1, not 1.0"),
        ("0.1", ["--alora_from", "question"], "takes no part in plain chat"),
    ):
        with pytest.raises(SystemExit, match=message):
            train_llama_squad.main(["--chat_share", share, *more])
