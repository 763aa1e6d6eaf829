"""The model behind the page: it reads, it speaks, with its adapter or without, for all visitors.

The weights are there once. Whoever uses them holds the lock, for a token or a reading at a time.
"""

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from llama_squad.activation import adapter_off
from llama_squad.arguments import AppArguments, EvalArguments, ModelArguments, resolve_decoding
from llama_squad.calibration import Calibration
from llama_squad.decoding.chat import ChatSession
from llama_squad.prompts import Message, build_messages
from llama_squad.reader import Reading, SpanAnswer

SPANS = 5
"""Likeliest spans to show of each question: as many as keys 1 to 5 pick."""

LONGEST_TEXT, LONGEST_QUESTION = 400_000, 2_000
"""Characters; a text of 100,000 is read in windows, in seconds or minutes."""


@dataclass(frozen=True)
class Answering:
    """What answers on this page, as verdicts name it; digests are None where it is not local."""

    model: str
    adapter: str = ""
    model_digest: str | None = None
    adapter_digest: str | None = None


@dataclass(frozen=True)
class Desk:
    """Whatever the page asks of the model.

    Attributes:
        reader: reads records, and never abstains (its threshold is 1): the page decides.
        session: speaks.
        args: the page's.
        threshold: the no-answer threshold to begin with.
        answering: who answers.
        lock: held by ``session`` while it speaks.
        calibration: of the reader's na_prob.
    """

    reader: Any
    session: ChatSession
    args: AppArguments
    threshold: float = 0.5
    answering: Answering = field(default_factory=lambda: Answering(""))
    lock: AbstractContextManager[Any] = field(default_factory=threading.Lock)
    calibration: Calibration = field(default_factory=Calibration)

    @property
    def has_adapter(self) -> bool:
        """Whether there is a base model to compare with: the adapter can be switched off."""
        return hasattr(self.session.model, "peft_config")

    def read(self, records: Sequence[Any], base: bool = False) -> list[Reading]:
        """Read records of "question" and "context"; ``base``: with the adapter switched off.

        Raises:
            ValueError: one is empty, or too long.
        """
        for record in records:
            check_length(record["context"], record["question"])
        with self.lock, adapter_off(self.session.model, base):
            return self.reader.read(records)

    def ask(self, context: str, question: str, base: bool = False) -> Iterator[list[Message]]:
        """Stream the free reply to a question about a text."""
        check_length(context, question)
        return self.session.ask(context, question, base)

    def chat(self, talk: list[Message], said: str, base: bool = False) -> Iterator[list[Message]]:
        """Stream a conversation with one more turn."""
        check_length("-", said)
        return self.session.converse(talk, [said], base=base)

    def prompt_text(self, context: str, question: str) -> str:
        """Return the prompt as the model reads it, control tokens and all."""
        record = {"context": context, "question": question}
        args = self.args
        messages = build_messages(record, args.prompt, args.system_prompt, answer=False)
        (ids,) = self.session.encoder.encode_prompts([messages])
        return str(self.session.encoder.tokenizer.decode(ids))


def check_length(context: str, question: str) -> None:
    """Refuse what is empty or beyond reason. Raises ValueError, in a visitor's words."""
    if not context.strip() or not question.strip():
        raise ValueError("Fill in a text and a question first.")
    if len(context) > LONGEST_TEXT:
        raise ValueError(
            f"The text has {len(context):,} characters; at most {LONGEST_TEXT:,} are read here. "
            "Shorten it, or use python -m llama_squad."
        )
    if len(question) > LONGEST_QUESTION:
        raise ValueError(
            f"The question has {len(question):,} characters; at most {LONGEST_QUESTION:,} are "
            "read here. Shorten it."
        )


def load(
    args: AppArguments, model_args: ModelArguments, tell: Callable[[str], object] = print
) -> Desk:
    """Load the model, the adapter apart from its base. Raises ValueError: it cannot be had."""
    from llama_squad import modeling
    from llama_squad.reader import Reader
    from llama_squad.thresholds import load_abstention
    from llama_squad.weights import weights_digest

    modeling.choose_device()
    asking = resolve_decoding(EvalArguments(
        adapter_name=args.adapter_name, prompt=args.prompt, system_prompt=args.system_prompt,
        reasoning_tokens=args.reasoning_tokens, filler=args.filler, quantize=args.quantize,
        n_best=SPANS,
    ))  # fmt: skip
    abstention = load_abstention(asking, model_args)
    encoder = modeling.load_encoder(
        model_args, args.reasoning_tokens, args.adapter_name, args.filler
    )
    model: Any = modeling.load_model(model_args, args.quantize, args.adapter_name, merge=False)
    model.eval()
    lock = threading.Lock()
    answering = Answering(
        model_args.model_name, args.adapter_name or "",
        weights_digest(model_args.model_name), weights_digest(args.adapter_name),
    )  # fmt: skip
    reader = Reader.of(model, encoder, asking, dataclasses.replace(abstention, threshold=1.0))
    session = ChatSession(model, encoder, args, tell, lock)
    return Desk(
        reader, session, args, abstention.threshold, answering, lock, abstention.calibration
    )


# Deciding ------------------------------------------------------------------------------------


def decide(reading: Reading, threshold: float) -> Reading:
    """Return what another threshold makes of a reading that did not abstain."""
    if reading.na_prob is None or reading.na_prob <= threshold:
        return reading
    return dataclasses.replace(reading, answer=None, start=None, end=None)


@dataclass(frozen=True)
class Share:
    """A span, or None for no answer, and its part of the probability of all that are shown."""

    span: SpanAnswer | None
    probability: float


def shares(reading: Reading) -> list[Share]:
    """Return the likeliest spans and the abstention, the likeliest first.

    na_prob weighs the abstention against the best span, whose log P it gives away.
    """
    if reading.na_prob is None or not reading.n_best:
        return []
    within = min(max(reading.na_prob, 1e-9), 1 - 1e-9)
    best = reading.score if reading.answer is not None else None
    log_none = (reading.n_best[0].log_prob if best is None else best) + math.log(
        within / (1 - within)
    )
    weighed: list[tuple[SpanAnswer | None, float]] = [(s, s.log_prob) for s in reading.n_best]
    weighed.append((None, log_none))
    highest = max(log_prob for _, log_prob in weighed)
    total = sum(math.exp(log_prob - highest) for _, log_prob in weighed)
    found = [Share(span, math.exp(log_prob - highest) / total) for span, log_prob in weighed]
    return sorted(found, key=lambda share: -share.probability)
