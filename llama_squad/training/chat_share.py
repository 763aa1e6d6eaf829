"""Plain chat among the training conversations: the base's own replies, so that it keeps talking.

The untuned base answers bundled prompts once, greedily; a share of the training conversations are
these, with the loss on the replies. The replies lie beside the dataset, under a name that tells
what they were made from, so that runs share them, and one that is stopped goes on.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama_squad.activation import adapter_off
from llama_squad.answers import NO_ANSWER
from llama_squad.arguments import ModelArguments, TrainArguments
from llama_squad.chat_check import answer_greedily, classify_reply, read_prompts
from llama_squad.config import write_json
from llama_squad.decoding.spans import reply_ids
from llama_squad.durable import one_line_errors
from llama_squad.encoding import IGNORE, ChatEncoder, Encoded
from llama_squad.prompts import Message
from llama_squad.training.checkpoints import digest, tokenizer_digests
from llama_squad.weights import weights_digest

TRAINING_PROMPTS = Path(__file__).parents[1] / "chat_training_prompts.txt"
"""Others than those of ``chat_check.CHAT_PROMPTS``, which must not have been trained."""

REPLY_TOKENS = 128
"""Length limit of a reply; one that reaches it is trained without the end of its turn."""

BATCH = 16
"""Prompts that are answered at once, and kept."""


def chat_conversations(system_prompt: str) -> list[list[Message]]:
    """Return the conversations to be answered: every other one begins with the system prompt."""
    system = [{"role": "system", "content": system_prompt.strip()}] if system_prompt.strip() else []
    return [
        [*(system if index % 2 else []), {"role": "user", "content": prompt}]
        for index, prompt in enumerate(read_prompts(TRAINING_PROMPTS))
    ]


def chat_examples(
    model: Any,
    encoder: ChatEncoder,
    args: TrainArguments,
    model_args: ModelArguments,
    system_prompt: str,
) -> list[Encoded]:
    """Return the base's replies to plain prompts as examples; they are made where they are missing.

    Replies without a word, and those that loop, are left out.

    Args:
        model: the base, or a PEFT model whose adapter is switched off for this.
        encoder: the tokenizer's, with the chat template.
        args: of the run.
        model_args: of the run.
        system_prompt: of the dataset.
    """
    conversations = chat_conversations(system_prompt)
    made_from = {
        **tokenizer_digests(encoder),
        "weights": weights_digest(model_args.model_name) or model_args.model_name,
        "quantize": args.quantize and not args.full_parameters and model_args.bnb_4bit_quant_type,
        "dtype": str(model.dtype),
        "reply_tokens": REPLY_TOKENS,
        "conversations": conversations,
    }
    data = Path(args.dataset_name)
    file = data.with_name(f"{data.name}.chat-{digest(made_from)}.json")
    prompts = encoder.encode_prompts(conversations, final=False)
    replies = _read(file)
    training = model.training
    model.eval()
    bar = tqdm(total=len(prompts), initial=len(replies), desc="Chatting", unit=" replies")
    with adapter_off(model), bar:
        while len(replies) < len(prompts):
            batch = slice(len(replies), len(replies) + BATCH)
            replies += answer_greedily(model, encoder, prompts[batch], REPLY_TOKENS)
            with one_line_errors(file):
                write_json(file, {"made_from": made_from, "replies": _told(encoder, replies)})
            bar.update(len(replies) - bar.n)
    model.train(training)
    end = reply_ids(encoder, NO_ANSWER)[-1:]
    return [
        _example(prompt, reply + (end if len(reply) < REPLY_TOKENS else []))
        for prompt, reply in zip(prompts, replies, strict=True)
        if classify_reply(str(encoder.tokenizer.decode(reply)))[0] not in ("empty", "repetitive")
    ]


def _told(encoder: ChatEncoder, replies: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    decode = encoder.tokenizer.decode
    return [{"reply": decode(list(ids)), "ids": list(ids)} for ids in replies]


def _read(file: Path) -> list[list[int]]:
    """Return the replies that are there already.

    Raises:
        ValueError: the file is damaged.
    """
    if not file.is_file():
        return []
    try:
        return [entry["ids"] for entry in json.loads(file.read_text("utf-8"))["replies"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, and it is made anew") from error


def _example(prompt: list[int], reply: list[int]) -> Encoded:
    return {"input_ids": prompt + reply, "labels": [IGNORE] * len(prompt) + reply}


def add_chat(
    encoded: Any,
    examples: Sequence[Encoded],
    share: float,
    max_length: int | None,
    seed: int,
    *,
    marked: bool = False,
) -> Any:
    """Return a training split in which a share of the conversations is chat, each one's own group.

    Each example comes in as often as the others, give or take once.

    Args:
        encoded: of ``encode_split``.
        examples: of ``chat_examples``.
        share: of the whole, at least 0 and below 1.
        max_length: longer examples are left out.
        seed: of the ones that come in once more.
        marked: give each example "chat", whether it is.

    Raises:
        ValueError: no example fits.
    """
    from datasets import Dataset, concatenate_datasets

    fit = [e for e in examples if max_length is None or len(e["input_ids"]) <= max_length]
    if not fit:
        raise ValueError(
            f"the base gave no reply to plain prompts that fits into {max_length} tokens: leave "
            "--chat_share out, or raise --max_seq_length"
        )
    random.Random(seed).shuffle(fit)
    wanted = round(len(encoded) * share / (1 - share))
    rows = []
    for index in range(wanted):
        example = fit[index % len(fit)]
        length = len(example["input_ids"])
        row = {**example, "paragraph": f"chat {index}", "length": length}
        if "hidden" in encoded.column_names:  # chat has no filler
            row["hidden"] = [length, length]
        rows.append(row)
    count = len(encoded)
    if rows:
        chat = Dataset.from_list(rows, features=encoded.features)
        encoded = concatenate_datasets([encoded, chat])
    return (
        encoded.add_column("chat", [n >= count for n in range(len(encoded))]) if marked else encoded
    )
