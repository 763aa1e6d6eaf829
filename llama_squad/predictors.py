"""Who answers: a model loaded here, asked by paragraphs.

``LocalModel`` turns records into prompts (called turn by turn where the prompt style has several),
has them answered a batch of paragraphs at a time, and yields result rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from llama_squad.answers import extract_answer
from llama_squad.collator import ConversationEncoder
from llama_squad.generation import Generator, Paragraph, Reply
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
