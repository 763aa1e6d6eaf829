"""A chat model that is loaded here, called turn by turn where the prompt style has several turns.

A context beyond the model's positions is read in windows.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from llama_squad.activation import activation_of
from llama_squad.decoding.generator import Generator
from llama_squad.decoding.kept import Kept
from llama_squad.decoding.replies import Paragraph, Reply
from llama_squad.decoding.windows import cut_windows, merge_windows
from llama_squad.encoding import ChatEncoder
from llama_squad.predictors.base import Batch, Prediction
from llama_squad.prompts import (
    SYSTEM_PROMPT,
    ActsFrom,
    Message,
    Record,
    adapter_start,
    build_messages,
)
from llama_squad.tree import common_prefix

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
        model: on its device, in evaluation mode. Its weights must not change, see ``Generator``.
        encoder: the tokenizer's, with the chat template and the reasoning tokens.
        prompt: a key of ``PROMPTS``.
        system_prompt: "" for none.
        keep_contexts: of a context that is asked about alone, keep what was run before its
            question: the next question about it is run alone.
        options: what ``Generator`` takes: decoding, num_beams, max_new_tokens, na_prob_thresh,
            n_best, length_penalty, span_boundaries, stop_after_answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: ChatEncoder,
        *,
        prompt: str = "single_turn",
        system_prompt: str = SYSTEM_PROMPT,
        keep_contexts: bool = False,
        **options: Any,
    ) -> None:
        self._encoder, self._keep_contexts = encoder, keep_contexts
        self._prompt, self._system_prompt = prompt, system_prompt
        activation = activation_of(model)
        self._acts_from: ActsFrom = activation.where if activation else "start"
        self._generator = Generator(model, encoder, **options)
        self._max_new_tokens: int = self._generator.options.max_new_tokens
        self._n_best: int = self._generator.options.n_best
        self._turns = Generator(
            model, encoder, decoding="free", max_new_tokens=TURN_TOKENS, kept=self.kept
        )

    @property
    def kept(self) -> Kept:
        """What its generators keep."""
        return self._generator.options.kept

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
        asked = self._paragraphs(batch, conversations)
        replies = self._generator.reply(asked)
        for part, paragraph, answers in zip(parts, asked, replies, strict=True):
            for place, ids, reply in zip(part.places, paragraph.prompts, answers, strict=True):
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
        size = len(self._encoder.plain.encode(context, add_special_tokens=False).ids)
        rest = [place for place in places if place not in fit]
        sizes = {place: room - lengths[place - first] + size for place in rest}
        for place in rest:
            if not self._generator.constraint.windowed or sizes[place] < LEAST_WINDOW:
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
            windows = cut_windows(self._encoder.plain, context, size, WINDOW_OVERLAP)
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
        before = len(self._encoder.filler_ids) + len(self._encoder.reasoning_ids)
        sizes = [
            turns + before + sum(len(m["content"].encode()) + TEMPLATE_TOKENS for m in messages)
            for messages in conversations
        ]
        if max(sizes) <= room:
            return sizes
        return [turns + len(ids) for ids in self._encoder.encode_prompts(conversations)]

    def _messages(self, record: Record) -> list[Message]:
        return build_messages(record, self._prompt, self._system_prompt, answer=False)

    @functools.cached_property
    def _prefix(self) -> list[int]:
        """The tokens that all prompts begin with, whatever the text and the question are."""
        marks = "a", "1", '"', "\ue000"
        prompts = self._encoder.encode_prompts(
            [self._messages({"context": mark, "question": mark}) for mark in marks]
        )
        return prompts[0][: common_prefix(prompts)]

    def _talk(
        self, batch: Sequence[Sequence[Record]], conversations: Sequence[Sequence[list[Message]]]
    ) -> None:
        """Fill in the model's replies before the last user turn, one turn after the other."""
        roles = [message["role"] for message in conversations[0][0]]
        for turn in [index for index, role in enumerate(roles) if role == "assistant"]:
            so_far = [[messages[:turn] for messages in group] for group in conversations]
            replies = self._turns.reply(self._paragraphs(batch, so_far, final=False))
            for group, answers in zip(conversations, replies, strict=True):
                for messages, reply in zip(group, answers, strict=True):
                    messages[turn]["content"] = reply.completion.strip()

    def _paragraphs(
        self,
        batch: Sequence[Sequence[Record]],
        conversations: Sequence[Sequence[list[Message]]],
        final: bool = True,
    ) -> list[Paragraph]:
        """Encode conversations, a group a paragraph; ``final`` as ``encode_prompts`` has it."""
        paragraphs = []
        for records, group in zip(batch, conversations, strict=True):
            starts: list[int] = []
            if self._acts_from == "start" or (self._acts_from == "reply" and not final):
                prompts = self._encoder.encode_prompts(group, final)
            else:
                pairs = zip(group, records, strict=True)
                places = [adapter_start(m, r, self._prompt, self._acts_from) for m, r in pairs]
                encoded = self._encoder.encode_activated_prompts(group, places, final)
                prompts, starts = [ids for ids, _ in encoded], [start for _, start in encoded]
            filler = self._encoder.filler_ids if final else []
            hidden = [self._encoder.filler_of(ids) for ids in prompts] if filler else []
            prefix = self._prefix
            known = len(prefix) if all(ids[: len(prefix)] == prefix for ids in prompts) else 0
            stem = 0
            if self._keep_contexts and len(batch) == 1:
                known_already = self._acts_from == "question"
                asked = starts if known_already else self._question_starts(group, records)
                stem = min(common_prefix(prompts), *asked)
            context = records[0]["context"]
            paragraphs.append(Paragraph(context, prompts, starts, hidden, known, stem))
        return paragraphs

    def _question_starts(
        self, group: Sequence[Sequence[Message]], records: Sequence[Record]
    ) -> list[int]:
        """Return how many tokens stand before the question in each prompt of a paragraph."""
        pairs = zip(group, records, strict=True)
        places = [adapter_start(m, r, self._prompt, "question") for m, r in pairs]
        return [start for _, start in self._encoder.encode_activated_prompts(group, places)]
