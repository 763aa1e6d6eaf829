"""Who answers: a chat model loaded here, one behind a server, or an extractive encoder.

All take records by paragraph, a batch at a time, and give the replies from which the rows of the
result file are made. Chat models are called turn by turn where the prompt style has several turns.
"""

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_squad.answers import NO_ANSWER, extract_answer, format_answer
from llama_squad.collator import ConversationEncoder
from llama_squad.generation import Generator, Paragraph, Reply, Span
from llama_squad.prompts import SYSTEM_PROMPT, Message, build_messages
from llama_squad.results import Row, make_row

Record = Mapping[str, Any]

TURN_TOKENS = 256
"""Length limit of a reply before the last one of a multi-turn prompt."""


@dataclass(frozen=True)
class Prediction:
    """A record with the model's reply to it."""

    record: Record
    prompt_text: str
    reply: Reply

    def row(self) -> Row:
        """Return the row of the result file."""
        reply = self.reply
        answer = extract_answer(reply.completion)
        return make_row(
            self.record, reply.completion, answer, self.prompt_text, reply.na_prob,
            score=reply.score,
        )  # fmt: skip


def group_paragraphs(records: Sequence[Record]) -> list[list[Record]]:
    """Group records by context, in the order in which the contexts come first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["context"], []).append(record)
    return list(groups.values())


Batch = list[list[Record]]
"""Records by paragraph."""


def batch_paragraphs(records: Sequence[Record], batch_size: int) -> Iterator[Batch]:
    """Yield whole paragraphs, as many as hold ``batch_size`` questions; a larger one is parted."""
    batch: Batch = []
    groups = group_paragraphs(records)
    for group in groups:
        for start in range(0, len(group), batch_size):
            part = list(group[start : start + batch_size])
            if batch and sum(map(len, batch)) + len(part) > batch_size:
                yield batch
                batch = []
            batch.append(part)
    if batch:
        yield batch


class Predictor(Protocol):
    """Whoever answers records."""

    def answer(self, batch: Batch) -> list[Prediction]:
        """Answer the records of several paragraphs, in order."""


class LocalModel:
    """A causal language model that answers records.

    Args:
        model: on its device, in evaluation mode.
        encoder: the tokenizer's, with the chat template and the reasoning tokens.
        prompt: a key of ``PROMPTS``.
        system_prompt: "" for none.
        options: what ``Generator`` takes: decoding, num_beams, max_new_tokens, na_prob_thresh,
            n_best.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: ConversationEncoder,
        *,
        prompt: str = "single_turn",
        system_prompt: str = SYSTEM_PROMPT,
        **options: Any,
    ) -> None:
        self._encoder = encoder
        self._prompt, self._system_prompt = prompt, system_prompt
        self._generator = Generator(model, encoder, **options)
        self._turns = Generator(model, encoder, decoding="free", max_new_tokens=TURN_TOKENS)

    def answer(self, batch: Batch) -> list[Prediction]:
        """Answer the records of several paragraphs at once, in order."""
        conversations = [[self._messages(record) for record in group] for group in batch]
        self._talk(batch, conversations)
        prompts = [self._encoder.encode_prompts(group) for group in conversations]
        replies = self._generator.reply(_paragraphs(batch, prompts))
        return [
            Prediction(record, str(self._encoder.tokenizer.decode(ids)), reply)
            for triples in map(zip, batch, prompts, replies)
            for record, ids, reply in triples
        ]

    def _messages(self, record: Record) -> list[Message]:
        return build_messages(record, self._prompt, self._system_prompt, answer=False)

    def _talk(
        self, batch: Sequence[Sequence[Record]], conversations: Sequence[Sequence[list[Message]]]
    ) -> None:
        """Fill in the model's replies before the last user turn, one turn after the other."""
        roles = [message["role"] for message in conversations[0][0]]
        for turn in [index for index, role in enumerate(roles) if role == "assistant"]:
            prompts = [
                self._encoder.encode_prompts([messages[:turn] for messages in group], final=False)
                for group in conversations
            ]
            replies = self._turns.reply(_paragraphs(batch, prompts))
            for group, answers in zip(conversations, replies, strict=True):
                for messages, reply in zip(group, answers, strict=True):
                    messages[turn]["content"] = reply.completion.strip()


def _paragraphs(
    batch: Sequence[Sequence[Record]], prompts: Sequence[Sequence[list[int]]]
) -> list[Paragraph]:
    return [Paragraph(group[0]["context"], ids) for group, ids in zip(batch, prompts, strict=True)]


class ServerModel:
    """A chat model behind an OpenAI-compatible server: OpenAI, vLLM, llama.cpp, ...

    The key is read from the environment variable OPENAI_API_KEY. A batch's questions are asked at
    once, each in its own thread; rate limits and lost connections are waited out.

    Args:
        model_name: the server's name of the model.
        base_url: such as http://localhost:8000/v1; None for OpenAI's.
        prompt, system_prompt: as ``LocalModel`` has them.
        max_new_tokens: length limit of a reply.
        retries: how often a request is repeated, ever more slowly, before the run ends.

    Raises:
        ValueError: the openai package is not installed; OpenAI is asked without a key. In
            ``answer``: the server refuses, or cannot be reached.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        *,
        prompt: str = "single_turn",
        system_prompt: str = SYSTEM_PROMPT,
        max_new_tokens: int = 256,
        retries: int = 8,
    ) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ValueError("--predictor server needs the client: pip install openai") from error
        key = os.environ.get("OPENAI_API_KEY")
        if not key and not base_url:
            raise ValueError(
                "OpenAI asks for a key: set OPENAI_API_KEY, or name another server with --base_url"
            )
        self._client = OpenAI(api_key=key or "none", base_url=base_url, max_retries=retries)
        limit = "max_tokens" if base_url else "max_completion_tokens"  # OpenAI's newer name
        self._options: dict[str, Any] = {
            "model": model_name, "temperature": 0, limit: max_new_tokens
        }  # fmt: skip
        self._prompt, self._system_prompt = prompt, system_prompt

    def answer(self, batch: Batch) -> list[Prediction]:
        """Answer the records of several paragraphs at once, in order."""
        records = list(itertools.chain.from_iterable(batch))
        with ThreadPoolExecutor(len(records)) as threads:
            return list(threads.map(self._ask, records))

    def _ask(self, record: Record) -> Prediction:
        messages = build_messages(record, self._prompt, self._system_prompt, answer=False)
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                message["content"] = self._reply(messages[:turn]).strip()
        text = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
        return Prediction(record, text, Reply(self._reply(messages), [], 0.0))

    def _reply(self, messages: Any) -> str:
        from openai import OpenAIError

        try:
            done = self._client.chat.completions.create(messages=messages, **self._options)
        except OpenAIError as error:
            raise ValueError(
                f"{self._client.base_url} does not answer for {self._options['model']!r}: {error}. "
                "What was answered so far is kept: the same command goes on from there"
            ) from error
        return done.choices[0].message.content or ""


class Encoder:
    """An extractive encoder that was trained on SQuAD 2.0, such as deepset/deberta-v3-large-squad2.

    A span's score is the sum of the logits of its first and last token, that of "no answer" those
    of the first token of all; of a context in several windows the best span and the least certain
    abstention count, as in the official BERT baseline (Devlin et al. 2019, section 4.3).

    Args:
        model: with a question-answering head, on its device, in evaluation mode.
        tokenizer: a fast one.
        na_prob_thresh: abstain where sigmoid(no answer - best span) is above this.
        window, stride: tokens of a window, and of its overlap with the next.
        longest: tokens of the longest answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        na_prob_thresh: float = 0.5,
        *,
        window: int = 384,
        stride: int = 128,
        longest: int = 30,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._threshold = na_prob_thresh
        self._window, self._stride, self._longest = window, stride, longest

    @torch.inference_mode()
    def answer(self, batch: Batch) -> list[Prediction]:
        """Answer the records of several paragraphs at once, in order."""
        records = list(itertools.chain.from_iterable(batch))
        features = self._tokenizer(
            [record["question"].strip() for record in records],
            [record["context"] for record in records],
            truncation="only_second", max_length=self._window, stride=self._stride,
            return_overflowing_tokens=True, return_offsets_mapping=True, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        offsets = features.pop("offset_mapping")
        owners = features.pop("overflow_to_sample_mapping").tolist()
        output = self._model(**features.to(self._model.device))
        starts, ends = output.start_logits.float().cpu(), output.end_logits.float().cpu()
        best: dict[int, Span] = {}
        nothing: dict[int, float] = {}
        for index, owner in enumerate(owners):
            none = float(starts[index, 0] + ends[index, 0])
            nothing[owner] = min(nothing.get(owner, none), none)
            inside = torch.tensor([part == 1 for part in features.sequence_ids(index)])
            inside &= offsets[index, :, 0] < offsets[index, :, 1]
            if not inside.any():
                continue
            first, last, score = self._best_span(starts[index], ends[index], inside)
            if owner not in best or score > best[owner].log_prob:
                begin, end = int(offsets[index, first, 0]), int(offsets[index, last, 1])
                text = records[owner]["context"][begin:end].strip()  # "▁" includes its space
                best[owner] = Span(text, score)
        return [
            self._prediction(record, best.get(number), nothing[number])
            for number, record in enumerate(records)
        ]

    def _best_span(
        self, starts: torch.Tensor, ends: torch.Tensor, inside: torch.Tensor
    ) -> tuple[int, int, float]:
        """Return the first and last token and the score of the best span of a window."""
        scores = starts[:, None] + ends[None, :]
        allowed = torch.ones_like(scores).triu().tril(self._longest - 1).bool()
        allowed &= inside[:, None] & inside[None, :]
        first, last = divmod(int(scores.masked_fill(~allowed, -torch.inf).argmax()), len(ends))
        return first, last, float(scores[first, last])

    def _prediction(self, record: Record, best: Span | None, nothing: float) -> Prediction:
        margin = nothing - best.log_prob if best else math.inf
        na_prob = float(torch.sigmoid(torch.tensor(margin)))
        if best is None or na_prob > self._threshold:
            reply = Reply(format_answer(NO_ANSWER), [], nothing, best, na_prob=na_prob)
        else:
            reply = Reply(format_answer(best.text), [], best.log_prob, best, na_prob=na_prob)
        return Prediction(record, record["question"], reply)
