"""Plain chat in training: the base's own replies, made once, and a share of the conversations."""

import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from datasets import Dataset
from helpers import (
    collator,
    dataset_folder,
    encoded_dataset,
    make_records,
    model_folder,
    tiny_model,
    tiny_tokenizer,
    training_flags,
)
from peft import LoraConfig, get_peft_model

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
from llama_squad.training.trainer import answer_loss, chat_logits_of_base
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


@pytest.mark.slow
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


def chat_rows(tmp_path: Path) -> list[list[dict[str, Any]]]:
    """Return two paragraphs of questions, and two chats, as groups of marked examples."""
    mixed = add_chat(
        encoded_dataset(make_records(2, [2])), make(tiny_model(), tmp_path), 0.4, 4096, 1,
        marked=True,
    )  # fmt: skip
    examples = [
        {name: example[name] for name in ("input_ids", "labels", "chat")} for example in mixed
    ]
    assert [e["chat"] for e in examples] == [False] * 4 + [True] * 3
    return [examples[:2], examples[2:4], *([e] for e in examples[4:])]


def adapted(change: float) -> Any:
    """Return a model with an adapter, whose second matrices are ``change`` times random."""
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name and change:
            torch.nn.init.normal_(weight, std=change)
    return model


def chat_term(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what a weight of 1 adds to the loss."""
    return answer_loss(model, batch, chat_kl=1.0)[0] - answer_loss(model, batch)[0]


def test_the_divergence_from_the_base(tmp_path: Path) -> None:
    """It is that of each reply alone, 0 for an untouched adapter, and has gradients."""
    rows = chat_rows(tmp_path)
    shared = collator()([{"paragraphs": rows}])
    plain = collator()([e for group in rows for e in group])
    untouched = adapted(0.0)
    assert float(chat_term(untouched, shared).detach()) == pytest.approx(0.0, abs=1e-4)

    model, expected = adapted(0.3), 0.0
    for (example,) in rows[2:]:
        ids = torch.tensor([example["input_ids"]])
        start = sum(label == IGNORE for label in example["labels"])
        with torch.no_grad():
            tuned = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            with model.disable_adapter():
                base = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        expected += float((base.exp() * (base - tuned)).sum())
    assert expected > 0.1
    for batch in (shared, plain):
        assert float(chat_term(model, batch).detach()) == pytest.approx(expected, rel=1e-3)

    names = {name for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    base_logits = chat_logits_of_base(model, shared)
    assert base_logits is not None and not base_logits.requires_grad
    chat_term(model, shared).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == names
    step = 1e-3 / sum(float(g.pow(2).sum()) for g in found.values())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in found:
                p -= step * found[name]
    # to first order a small step down the gradient lowers it by the step times its square
    assert expected - float(chat_term(model, shared).detach()) == pytest.approx(1e-3, rel=0.2)
    # questions have no part in it, and no pass of the base
    assert chat_logits_of_base(model, collator()([{"paragraphs": rows[:2]}])) is None


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--no_share_context"]])
def test_the_stage_holds_chat_to_the_base(more: list[str], tmp_path: Path) -> None:
    """The divergence is in the loss of the run, and a large weight keeps the base's replies."""
    flags = [
        "--model_name", model_folder(tmp_path), "--no_quantize", "--report_to", "none",
        "--dataset_name", dataset_folder(tmp_path, make_records(6, [2, 3])), "--max_steps", "3",
        "--learning_rate", "1e-2", "--disable_tqdm", "True", "--lora_dropout", "0",
        "--chat_share", "0.5", "--logging_steps", "1", *more,
    ]  # fmt: skip
    losses = []
    for weight in ("0", "10"):
        train_llama_squad.main([*flags, "--chat_kl", weight, "--output_dir", f"out{weight}"])
        saved = json.loads(Path(f"out{weight}/checkpoint-3/trainer_state.json").read_text())
        losses.append([log["loss"] for log in saved["log_history"] if "loss" in log])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)  # an adapter begins as the base
    assert losses[1][2] > losses[0][2]


def test_a_divergence_of_nothing_is_refused() -> None:
    for argv, message in (
        (["--chat_kl", "1"], "--chat_kl weighs plain chat, of which there is none"),
        (["--chat_kl", "-1", "--chat_share", "0.1"], "--chat_kl must be at least 0"),
        (["--chat_kl", "1", "--chat_share", "0.1", "--full_parameters"], "without its adapter"),
        (["--loss_on", "all", "--filler", "2"], "would train the model to write filler"),
        (["--loss_on", "all", "--alora_from", "reply"], "takes no part in what stands before"),
    ):
        with pytest.raises(SystemExit, match=message):
            train_llama_squad.main(argv)


@pytest.mark.parametrize(
    ("more", "layout"),
    [
        ([], "Shared contexts: "),
        (["--row_tokens", "600", "--gradient_accumulation_steps", "2"], "Shared contexts: "),
        (["--no_share_context"], "contexts not shared: as asked"),
    ],
)
def test_the_loss_on_all_tokens(
    more: list[str], layout: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is that of TRL on whole sequences: each example's own, its context included."""
    records = make_records(6, [2, 3])
    flags = [
        "--model_name", model_folder(tmp_path), "--no_quantize", "--report_to", "none",
        "--dataset_name", dataset_folder(tmp_path, records), "--max_steps", "1", "--bf16", "False",
        "--disable_tqdm", "True", "--logging_steps", "1", "--lora_dropout", "0",
        "--per_device_train_batch_size", "30", "--loss_on", "all",
    ]  # fmt: skip
    train_llama_squad.main([*flags, "--show_mask", "1"])
    shown = capsys.readouterr().out
    assert records[0]["context"] in shown.split("\033[1;30;42m")[1]
    rows = Mock(side_effect=answer_loss)
    monkeypatch.setattr("llama_squad.training.trainer.answer_loss", rows)
    train_llama_squad.main([*flags, *more])
    assert layout in capsys.readouterr().out
    assert (rows.call_count > 1) == ("--row_tokens" in more)
    saved = json.loads(Path("results/checkpoint-1/trainer_state.json").read_text())
    (loss,) = [log["loss"] for log in saved["log_history"] if "loss" in log]
    total, count = 0.0, 0
    for example in encoded_dataset(records):
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            total += float(tiny_model()(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert loss == pytest.approx(total / count, rel=1e-4)


def test_a_divergence_on_all_tokens_of_chat_shares_none(tmp_path: Path, capsys: Any) -> None:
    flags = ["--no_quantize", "--max_steps", "1", "--loss_on", "all", "--chat_share", "0.3"]
    train_llama_squad.main(training_flags(tmp_path, *flags, "--chat_kl", "1"))
    assert "contexts not shared: --chat_kl falls on all tokens" in capsys.readouterr().out
