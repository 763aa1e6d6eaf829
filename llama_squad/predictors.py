"""Who answers: a chat model loaded here, or an extractive encoder; see also ``llama_squad.server``.

All give the replies from which the rows of the result file are made; those here take records by
paragraph, a batch at a time. Chat models are called turn by turn where the prompt style has several
turns.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_squad.answers import FAILED, NO_ANSWER, extract_answer, format_answer
from llama_squad.collator import ConversationEncoder
from llama_squad.generation import Generator, Paragraph, Reply, Span
from llama_squad.prompts import SYSTEM_PROMPT, Message, build_messages
from llama_squad.results import Row, make_row
from llama_squad.windows import cut_windows, merge_windows

Record = Mapping[str, Any]

TURN_TOKENS = 256
"""Length limit of a reply before the last one of a multi-turn prompt."""

REPLY_ROOM = 64
"""Tokens that a prompt must leave for the reply (fewer where --max_new_tokens is lower)."""

TEMPLATE_TOKENS = 64
"""A chat template adds fewer to a message."""

WINDOW_OVERLAP = 128
"""Tokens that two windows of a long context share, at most."""

LEAST_WINDOW = 32
"""Tokens of context that a window must hold to be of use."""


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


PARAGRAPH_QUESTIONS = 64
"""A paragraph of more questions is parted, whatever the batch size."""


def batch_paragraphs(records: Sequence[Record], batch_size: int) -> Iterator[Batch]:
    """Yield whole paragraphs, as many as hold ``batch_size`` questions, one at least.

    Which questions of a paragraph are answered together does not depend on ``batch_size``: in 16
    bits that would change the answers.
    """
    batch: Batch = []
    for group in group_paragraphs(records):
        for start in range(0, len(group), PARAGRAPH_QUESTIONS):
            part = list(group[start : start + PARAGRAPH_QUESTIONS])
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


@runtime_checkable
class ConcurrentPredictor(Predictor, Protocol):
    """Whoever can answer many records at once, with no need to wait for the rest of a batch."""

    def answer_all(self, records: Sequence[Record]) -> Iterator[list[Prediction]]:
        """Answer records, and yield the predictions as they are known, in whatever order."""


@dataclass(frozen=True)
class _Part:
    """Questions of a paragraph that are put to all of its context, or to one window of it."""

    places: list[int]
    """Which questions of the batch they are."""
    records: list[Record]
    start: int = 0
    """The character of the context at which the window begins."""


class LocalModel:
    """A causal language model that answers records.

    Args:
        model: on its device, in evaluation mode.
        encoder: the tokenizer's, with the chat template and the reasoning tokens.
        prompt: a key of ``PROMPTS``.
        system_prompt: "" for none.
        options: what ``Generator`` takes: decoding, num_beams, max_new_tokens, na_prob_thresh,
            n_best, length_penalty, span_boundaries.
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
        self._max_new_tokens: int = self._generator.max_new_tokens
        self._n_best: int = self._generator.n_best
        self._turns = Generator(model, encoder, decoding="free", max_new_tokens=TURN_TOKENS)

    @property
    def batch_size(self) -> int:
        """How many questions to answer at once, unless told."""
        return self._generator.batch_size()

    def answer(self, batch: Batch) -> list[Prediction]:
        """Answer the records of several paragraphs at once, in order.

        A context that is too long for the model is read in windows in span decoding; in free
        decoding, or where the question itself is too long, the prediction is a failure.
        """
        failures: dict[int, str] = {}
        parts: list[_Part] = []
        first = 0
        for group in batch:
            parts += self._parts(group, first, failures)
            first += len(group)
        replies = self._reply(parts)
        predictions = []
        for index, record in enumerate(itertools.chain.from_iterable(batch)):
            if index in failures:
                failed = Prediction(record, "", Reply("", [], None), failures[index])
                predictions.append(failed)
                continue
            found = replies[index]
            merged = found[0][2]
            if len(found) > 1:
                merged = merge_windows([(at, reply) for at, _, reply in found], self._n_best)
            prompts = [str(self._encoder.tokenizer.decode(ids)) for _, ids, _ in found]
            predictions.append(Prediction(record, "\n\n".join(prompts), merged))
        return predictions

    def _reply(self, parts: Sequence["_Part"]) -> dict[int, list[tuple[int, list[int], Reply]]]:
        """Answer parts of paragraphs: by place in the batch, each window's start, prompt, reply."""
        found: dict[int, list[tuple[int, list[int], Reply]]] = defaultdict(list)
        if not parts:
            return found
        batch = [part.records for part in parts]
        conversations = [[self._messages(record) for record in group] for group in batch]
        self._talk(batch, conversations)
        prompts = [self._encoder.encode_prompts(group) for group in conversations]
        replies = self._generator.reply(_paragraphs(batch, prompts))
        for part, asked, answers in zip(parts, prompts, replies, strict=True):
            for place, ids, reply in zip(part.places, asked, answers, strict=True):
                found[place].append((part.start, ids, reply))
        return found

    def _parts(
        self, group: Sequence[Record], first: int, failures: dict[int, str]
    ) -> list["_Part"]:
        """Part a paragraph into questions that its context fits with, and windows for the others.

        ``first`` is the first record's place in the batch. Those that cannot be asked are added to
        ``failures``.
        """
        places = list(range(first, first + len(group)))
        room = self._generator.room(min(REPLY_ROOM, self._max_new_tokens))
        lengths = self._prompt_lengths(group, room)
        fit = [place for place in places if lengths[place - first] <= room]
        parts = [_Part(fit, [group[place - first] for place in fit])] if fit else []
        if len(fit) == len(places):
            return parts
        context = group[0]["context"]
        tokenizer = self._encoder.tokenizer
        size = len(tokenizer.backend_tokenizer.encode(context, add_special_tokens=False).ids)
        rest = [place for place in places if place not in fit]
        sizes = {place: room - lengths[place - first] + size for place in rest}
        for place in rest:
            if not self._generator.vocabulary or sizes[place] < LEAST_WINDOW:
                failures[place] = (
                    f"the prompt is {lengths[place - first]:,} tokens long, and with "
                    f"{min(REPLY_ROOM, self._max_new_tokens)} for the reply the model reads "
                    f"{self._generator.positions:,}"
                )
        asked = [place for place in rest if place not in failures]
        return parts + (self._windows(group, asked, first, room, sizes) if asked else [])

    def _windows(
        self, group: Sequence[Record], places: Sequence[int], first: int, room: float,
        sizes: Mapping[int, float],
    ) -> list["_Part"]:  # fmt: skip
        """Put questions to windows of their context: as large as fit with all of them."""
        context = group[0]["context"]
        size = int(min(sizes[place] for place in places))
        while True:
            windows = cut_windows(self._encoder.tokenizer, context, size, WINDOW_OVERLAP)
            parts = [
                _Part(
                    list(places),
                    [{**group[place - first], "context": context[start:end]} for place in places],
                    start,
                )
                for start, end in windows
            ]
            longest = max(max(self._prompt_lengths(part.records, room)) for part in parts)
            if longest <= room or size <= LEAST_WINDOW:
                return parts
            size = max(LEAST_WINDOW, size - int(longest - room))  # ends moved to whole words

    def _prompt_lengths(self, group: Sequence[Record], room: float) -> list[int]:
        """Return the tokens of each prompt, at most where several turns are still to be filled.

        Where a prompt has fewer bytes than there is room for tokens, they stand for the tokens.
        """
        conversations = [self._messages(record) for record in group]
        turns = TURN_TOKENS * sum(m["role"] == "assistant" for m in conversations[0])
        sizes = [
            turns + sum(len(m["content"].encode()) + TEMPLATE_TOKENS for m in messages)
            for messages in conversations
        ]
        if max(sizes) <= room:
            return sizes
        return [turns + len(ids) for ids in self._encoder.encode_prompts(conversations)]

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
                text = context[begin:end]  # of which "▁" includes its space
                start = begin + len(text) - len(text.lstrip())
                best[owner] = Span(text.strip(), found[2], start)
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
