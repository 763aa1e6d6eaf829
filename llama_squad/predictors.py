"""Who answers: a chat model loaded here, one behind a server, or an extractive encoder.

All take records by paragraph, a batch at a time, and give the replies from which the rows of the
result file are made. Chat models are called turn by turn where the prompt style has several turns.
"""

import itertools
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Queue
from threading import Thread
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_squad.answers import FAILED, NO_ANSWER, extract_answer, format_answer
from llama_squad.collator import ConversationEncoder
from llama_squad.generation import Generator, Paragraph, Reply, Span
from llama_squad.prompts import SYSTEM_PROMPT, Message, build_messages
from llama_squad.results import Row, make_row

Record = Mapping[str, Any]

TURN_TOKENS = 256
"""Length limit of a reply before the last one of a multi-turn prompt."""

OPENAI_URL = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Prediction:
    """A record with the model's reply to it."""

    record: Record
    prompt_text: str
    reply: Reply
    failure: str = ""
    """Why there is no reply (the question was refused); "" where there is one."""

    def row(self) -> Row:
        """Return the row of the result file."""
        reply, best = self.reply, self.reply.best
        return make_row(
            self.record,
            self.failure or reply.completion,
            FAILED if self.failure else extract_answer(reply.completion),
            self.prompt_text,
            reply.na_prob,
            score=reply.score,
            best_span=best.text if best else None,
            best_span_log_prob=best.log_prob if best else None,
            no_answer_log_prob=reply.no_answer_log_prob,
            n_best=_n_best(reply) if reply.spans else None,
        )


def _n_best(reply: Reply) -> list[dict[str, Any]]:
    """Return a reply's spans; their probabilities and that of the abstention add up to 1."""
    assert reply.no_answer_log_prob is not None
    log_probs = [span.log_prob for span in reply.spans]
    highest = max(*log_probs, reply.no_answer_log_prob)
    total = sum(math.exp(value - highest) for value in (*log_probs, reply.no_answer_log_prob))
    return [
        {
            "text": span.text,
            "probability": math.exp(span.log_prob - highest) / total,
            "log_prob": span.log_prob,
        }
        for span in reply.spans
    ]


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
    once, each in its own thread; rate limits and lost connections are waited out by the client.

    Args:
        model_name: the server's name of the model.
        base_url: such as http://localhost:8000/v1; None for OpenAI's.
        prompt, system_prompt: as ``LocalModel`` has them.
        max_new_tokens: length limit of a reply.
        timeout: seconds to wait for a reply.
        retries: how often a request is repeated, ever more slowly, before the run ends.

    Raises:
        ValueError: the openai package is not installed; OpenAI is asked without a key. In
            ``answer``: the server refuses, cannot be reached, or answers something else.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        *,
        prompt: str = "single_turn",
        system_prompt: str = SYSTEM_PROMPT,
        max_new_tokens: int = 256,
        timeout: float = 600,
        retries: int = 8,
    ) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ValueError(
                "--predictor server needs its client: pip install -r requirements-predictors.txt"
            ) from error
        key = os.environ.get("OPENAI_API_KEY")
        if not key and not base_url:
            raise ValueError(
                "OpenAI asks for a key: set OPENAI_API_KEY, or name another server with --base_url"
            )
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError("OPENAI_API_KEY holds a character that no key has: copy it again")
        self._url = base_url or OPENAI_URL  # given, so that no variable redirects it unseen
        self._client = OpenAI(
            api_key=key or "none", base_url=self._url, timeout=timeout, max_retries=retries
        )
        limit = "max_tokens" if base_url else "max_completion_tokens"  # OpenAI's newer name
        self._options: dict[str, Any] = {
            "model": model_name, "temperature": 0, limit: max_new_tokens
        }  # fmt: skip
        self._prompt, self._system_prompt = prompt, system_prompt
        self._warned = False

    def answer(self, batch: Batch) -> list[Prediction]:
        """Answer the records of several paragraphs at once, in order."""
        records = list(itertools.chain.from_iterable(batch))
        replies: Queue[tuple[int, Prediction | Exception]] = Queue()

        def ask(index: int) -> None:
            try:
                replies.put((index, self._ask(records[index])))
            except Exception as error:
                replies.put((index, error))

        # Daemons: at the first failure, or at Ctrl-C, nothing waits for the others' retries.
        for index in range(len(records)):
            Thread(target=ask, args=(index,), daemon=True).start()
        predictions: dict[int, Prediction] = {}
        for _ in records:
            index, reply = replies.get()
            if isinstance(reply, Exception):
                raise reply
            predictions[index] = reply
        return [predictions[index] for index in range(len(records))]

    def _ask(self, record: Record) -> Prediction:
        messages = build_messages(record, self._prompt, self._system_prompt, answer=False)
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                message["content"] = self._reply(messages[:turn]).strip()
        text = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
        return Prediction(record, text, Reply(self._reply(messages), [], 0.0))

    def _reply(self, messages: Any) -> str:
        from openai import APITimeoutError, OpenAIError

        kept = "Finished batches are kept: the same command goes on from there"
        who = f"{self._url} (model {self._options['model']!r})"
        try:
            done = self._client.chat.completions.create(messages=messages, **self._options)
            choice = done.choices[0]
            content = choice.message.content or ""
            if not isinstance(content, str):
                raise TypeError(f"content is of type {type(content).__name__}")
        except OpenAIError as error:
            cause = f"{str(error).rstrip('.')} ({error.__cause__ or type(error).__name__})"
            if isinstance(error, APITimeoutError):
                cause += "; a smaller --batch_size asks for less at once"
            raise ValueError(f"{who} does not answer: {cause}. {kept}") from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"{who} answers with something that is no chat completion ({error}): does "
                f"--base_url end where the API begins, as in http://localhost:8000/v1? {kept}"
            ) from error
        if choice.finish_reason == "length" and not self._warned:
            self._warned = True
            print(
                "A reply was cut off at --max_new_tokens: give more if the model thinks first.",
                file=sys.stderr,
            )
        return content


class Encoder:
    """An extractive encoder that was trained on SQuAD 2.0, such as deepset/deberta-v3-large-squad2.

    A span's score is the sum of the logits of its first and last token, that of "no answer" those
    of the first token of all; of a context in several windows the best span and the least certain
    abstention count, and a question is cut, as in the official BERT baseline (Devlin et al. 2019,
    section 4.3). These sums stand where chat models have log-probabilities.

    Args:
        model: with a question-answering head, on its device, in evaluation mode.
        tokenizer: a fast one.
        na_prob_thresh: abstain where sigmoid(no answer - best span) is above this.
        window, stride: tokens of a window, and of its overlap with the next; fewer where the model
            has fewer positions.
        longest: tokens of the longest answer.
        batch_size: windows at once.

    Raises:
        ValueError: the model reads too little at once, or from the right (XLNet).
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
        batch_size: int = 32,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._threshold, self._longest, self._batch_size = na_prob_thresh, longest, batch_size
        # RoBERTa counts positions from 2.
        positions = getattr(model.config, "max_position_embeddings", None) or window + 2
        self._window = min(window, tokenizer.model_max_length, positions - 2)
        if self._window < 32 or tokenizer.padding_side != "right":
            raise ValueError(
                f"{model.config.model_type} is no encoder for this: it reads {self._window} tokens "
                f"at once (32 at least) and pads on the {tokenizer.padding_side} (right is needed)"
            )
        self._stride = min(stride, self._window // 3)

    @torch.inference_mode()
    def answer(self, batch: Batch) -> list[Prediction]:
        """Answer the records of several paragraphs at once, in order."""
        records = list(itertools.chain.from_iterable(batch))
        windows = self._tokenizer(
            [self._cut(record["question"].strip()) for record in records],
            [record["context"] for record in records],
            truncation="only_second", max_length=self._window, stride=self._stride,
            return_overflowing_tokens=True, return_offsets_mapping=True, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        offsets = windows.pop("offset_mapping")
        owners = windows.pop("overflow_to_sample_mapping").tolist()
        starts, ends = self._logits(dict(windows))
        best: dict[int, Span] = {}
        nothing: dict[int, float] = {}
        for index, owner in enumerate(owners):
            none = float(starts[index, 0] + ends[index, 0])
            nothing[owner] = min(nothing.get(owner, none), none)
            context = records[owner]["context"]
            texts = [
                context[begin:end].strip() if part == 1 else ""
                for (begin, end), part in zip(
                    offsets[index].tolist(), windows.sequence_ids(index), strict=True
                )
            ]
            found = self._best_span(starts[index], ends[index], texts)
            if found and (owner not in best or found[2] > best[owner].log_prob):
                begin, end = int(offsets[index, found[0], 0]), int(offsets[index, found[1], 1])
                best[owner] = Span(context[begin:end].strip(), found[2])  # "▁" includes its space
        return [
            self._prediction(record, best.get(number), nothing[number])
            for number, record in enumerate(records)
        ]

    def _cut(self, question: str) -> str:
        """Return the first tokens of a question: 64, or a third of a short window."""
        length = min(64, self._window // 3)
        encoded = self._tokenizer(
            question, add_special_tokens=False, truncation=True, max_length=length,
            return_offsets_mapping=True,
        )  # fmt: skip
        return question[: max((end for _, end in encoded["offset_mapping"]), default=0)]

    def _logits(self, windows: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of first and last tokens [windows, length], in float32 on the CPU."""
        starts, ends = [], []
        for begin in range(0, len(windows["input_ids"]), self._batch_size):
            part = slice(begin, begin + self._batch_size)
            inputs = {name: tensor[part].to(self._model.device) for name, tensor in windows.items()}
            output = self._model(**inputs)
            starts.append(output.start_logits.float().cpu())
            ends.append(output.end_logits.float().cpu())
        return torch.cat(starts), torch.cat(ends)

    def _best_span(
        self, starts: torch.Tensor, ends: torch.Tensor, texts: Sequence[str]
    ) -> tuple[int, int, float] | None:
        """Return the first and last token and the score of the best span of a window.

        ``texts``: those of the context's tokens, "" for all others. None: there is no span.
        """
        inside = torch.tensor([bool(text) for text in texts])
        allowed = torch.ones(len(texts), len(texts)).triu().tril(self._longest - 1).bool()
        allowed &= inside[:, None] & inside[None, :]
        allowed &= ~torch.diag(torch.tensor([text == NO_ANSWER for text in texts]))
        if not allowed.any():
            return None
        scores = (starts[:, None] + ends[None, :]).masked_fill(~allowed, -torch.inf)
        first, last = divmod(int(scores.argmax()), len(texts))
        return first, last, float(scores[first, last])

    def _prediction(self, record: Record, best: Span | None, nothing: float) -> Prediction:
        margin = nothing - best.log_prob if best else math.inf
        na_prob = float(torch.sigmoid(torch.tensor(margin)))
        if best is None or na_prob > self._threshold:
            text, score = NO_ANSWER, nothing
        else:
            text, score = best.text, best.log_prob
        reply = Reply(
            format_answer(text), [], score, best, no_answer_log_prob=nothing, na_prob=na_prob
        )
        return Prediction(record, record["question"], reply)
