"""Ask a tuned model from Python: questions and contexts in, answers with their places out.

    from llama_squad.reader import Reader

    reader = Reader("results/final_checkpoints")
    reading = reader("When did it open?", "The mill opened in 1912.")
    print(reading.answer, reading.start, reading.end, reading.na_prob)

Uses predictors and decoding; knows nothing of datasets or result files.
"""

import dataclasses
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, overload

from llama_squad import modeling, weights
from llama_squad.activation import adapter_off
from llama_squad.answers import extract_answer
from llama_squad.arguments import EvalArguments, ModelArguments, resolve_decoding
from llama_squad.calibration import Abstention
from llama_squad.decoding.generator import Generator
from llama_squad.encoding import ChatEncoder
from llama_squad.folders import THRESHOLD_FILE
from llama_squad.predictors.base import Prediction, batch_paragraphs
from llama_squad.predictors.local import LocalModel
from llama_squad.prompts import Message, Record
from llama_squad.sources.records import HALF, has_surrogate
from llama_squad.thresholds import load_abstention

Many = list[str] | tuple[str, ...]
"""Several questions, or their contexts."""


@dataclass(frozen=True)
class SpanAnswer:
    """A span that may be the answer: ``start`` and ``end`` are characters of the context."""

    text: str
    start: int
    end: int
    log_prob: float


@dataclass(frozen=True)
class Reading:
    """What a model reads in a context on one question.

    Attributes:
        answer: words of the context, or None where they do not hold the answer.
        start, end: characters of the context: ``context[start:end] == answer``; None without one.
        na_prob: the probability that there is no answer.
        score: log P of the reply.
        n_best: the likeliest spans, best first, also where the answer is None.
        failure: why the question could not be asked (it is longer than the model reads), or "".
    """

    answer: str | None
    start: int | None
    end: int | None
    na_prob: float | None
    score: float | None
    n_best: tuple[SpanAnswer, ...] = ()
    failure: str = ""


class Reader:
    """A chat model, with an adapter or without, that answers questions about texts.

    Args:
        name: an adapter, a merged model or a chat model: a folder, or a name on the Hub. An adapter
            brings its base and the prompt it was trained on; a folder the threshold and calibration
            that were tuned for it.
        model_name: another base for the adapter; a whole model takes its place.
        num_beams: as ``--num_beams``; 4 by default.
        n_best: how many spans to give of each question.
        na_prob_thresh: no answer where ``na_prob`` is above it; the tuned one or 0.5 by default.
        quantize: load the model in 4 bits.
        dtype: type of the weights: "auto", "float32", "bfloat16" or "float16".
        max_new_tokens: length limit of a span, and of a reply in ``chat``.
        span_boundaries: as ``--span_boundaries``.
        merge: an adapter is merged into weights of float32: faster, but ``chat`` cannot switch it
            off then.

    Raises:
        ValueError: it cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        *,
        model_name: str | None = None,
        num_beams: int | None = None,
        n_best: int = 5,
        na_prob_thresh: float | None = None,
        quantize: bool = False,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_new_tokens: int = 256,
        span_boundaries: Literal["word", "any"] = "word",
        merge: bool = False,
    ) -> None:
        # a merged model with a threshold that was tuned for it is taken for one, too
        tuned = Path(name, THRESHOLD_FILE).is_file()
        is_adapter = bool(weights.find_file(name, "adapter_config.json"))
        adapter = name if tuned or is_adapter else None
        settings = weights.saved_settings(adapter, None if adapter else name)
        base = (is_adapter and model_name) or (settings["model_name"] if adapter else name)
        model_args = ModelArguments(model_name=base, dtype=dtype)
        keys = ("prompt", "system_prompt", "reasoning_tokens", "filler")
        brought = {key: settings[key] for key in keys if key in settings}
        args = resolve_decoding(
            EvalArguments(
                adapter_name=adapter, num_beams=num_beams, na_prob_thresh=na_prob_thresh,
                quantize=quantize, max_new_tokens=max_new_tokens, n_best=n_best,
                span_boundaries=span_boundaries, **brought,
            )
        )  # fmt: skip
        abstention = load_abstention(args, model_args)
        encoder = modeling.load_encoder(model_args, args.reasoning_tokens, adapter, args.filler)
        model = modeling.load_model(model_args, quantize, adapter, merge=merge).eval()
        self._set_up(model, encoder, args, abstention)

    @classmethod
    def of(
        cls, model: Any, encoder: ChatEncoder, args: EvalArguments, abstention: Abstention
    ) -> Self:
        """Return a reader of a model that is loaded already, in evaluation mode.

        Args:
            model: on its device, with its adapter where it has one.
            encoder: its tokenizer's.
            args: how to ask.
            abstention: the threshold to go by, and the calibration.
        """
        reader = cls.__new__(cls)
        reader._set_up(model, encoder, resolve_decoding(args), abstention)
        return reader

    def _set_up(
        self, model: Any, encoder: ChatEncoder, args: EvalArguments, abstention: Abstention
    ) -> None:
        assert args.num_beams is not None
        self.args = dataclasses.replace(args, na_prob_thresh=abstention.threshold)
        self._local = LocalModel(
            model, encoder, prompt=args.prompt, system_prompt=args.system_prompt,
            num_beams=args.num_beams, max_new_tokens=args.max_new_tokens,
            n_best=max(1, args.n_best), span_boundaries=args.span_boundaries, keep_contexts=True,
            **abstention.options,
        )  # fmt: skip
        self._model, self._encoder = model, encoder
        self._lock = threading.Lock()  # an adapter is switched off for all threads
        limit = args.max_new_tokens
        self._speaker = Generator(
            model, encoder, decoding="free", max_new_tokens=limit, kept=self._local.kept
        )

    @overload
    def __call__(self, question: str, context: str) -> Reading: ...
    @overload
    def __call__(self, question: Many, context: str | Many) -> list[Reading]: ...
    def __call__(self, question: str | Many, context: str | Many) -> Reading | list[Reading]:
        """Answer a question about a context, or several at once, whose contexts are run once each.

        A context longer than the model reads is read in windows: the best span of them by odds,
        and no answer only where no window has one.

        Args:
            question: one, or a list of them.
            context: one for all, or one for each question of the list.

        Raises:
            ValueError: an empty context or question, half a character, or other numbers of them.
        """
        if isinstance(question, str):
            if not isinstance(context, str):
                raise ValueError("one question takes one context: give a list of questions, too")
            return self.read([{"question": question, "context": context}])[0]
        contexts = [context] * len(question) if isinstance(context, str) else list(context)
        if len(contexts) != len(question):
            raise ValueError(f"{len(question)} questions, but {len(contexts)} contexts")
        pairs = zip(question, contexts, strict=True)
        return self.read([{"question": q, "context": c} for q, c in pairs])

    def read(self, records: Sequence[Record]) -> list[Reading]:
        """Answer records with "question" and "context", in order; see ``__call__``."""
        for index, record in enumerate(records):
            for key in ("question", "context"):
                if not str(record[key]).strip():
                    raise ValueError(f"the {key} of question {index + 1} is empty")
                if has_surrogate(str(record[key])):
                    raise ValueError(f"the {key} of question {index + 1} has {HALF}")
        asked = [{**record, "id": index} for index, record in enumerate(records)]
        found: dict[int, Reading] = {}
        for batch in batch_paragraphs(asked, self._local.batch_size):
            with self._lock:
                answered = self._local.answer(batch)
            found |= {each.record["id"]: _reading(each) for each in answered}
        return [found[index] for index in range(len(records))]

    def chat(self, messages: Sequence[Message], adapter: bool = False) -> str:
        """Return a free reply to a conversation that ends with a user turn.

        Args:
            messages: user and assistant in turn, after a system prompt or without.
            adapter: the adapter is left on; without, its base speaks, whatever was trained. An
                activated one takes no part in either case.

        Raises:
            ValueError: it ends otherwise, or is longer than the model reads.
        """
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("the conversation must end with a user turn")
        from llama_squad.decoding.replies import Paragraph

        with self._lock, adapter_off(self._model, not adapter):
            prompt = self._encoder.encode_prompts([messages], final=False)[0]
            if self._speaker.room(len(prompt)) < 1:
                raise ValueError(
                    f"the conversation is {len(prompt):,} tokens long, which leaves no room for a "
                    "reply"
                )
            return self._speaker.reply([Paragraph("", [prompt])])[0][0].completion.strip()


def _reading(prediction: Prediction) -> Reading:
    reply = prediction.reply
    if prediction.failure:
        return Reading(None, None, None, None, None, failure=prediction.failure)
    spans = tuple(
        SpanAnswer(s.text, s.start, s.start + len(s.text), s.score)
        for s in reply.spans
        if s.start is not None
    )
    answer = extract_answer(reply.completion)
    if answer.state != "answer" or reply.best is None or reply.best.start is None:
        return Reading(None, None, None, reply.na_prob, reply.score, spans)
    start = reply.best.start
    return Reading(answer.text, start, start + len(answer.text), reply.na_prob, reply.score, spans)


def as_json(reading: Reading) -> dict[str, Any]:
    """Return a reading as plain data, for JSON; without its failure where there is none."""
    content = dataclasses.asdict(reading)
    if not reading.failure:
        del content["failure"]
    return content
