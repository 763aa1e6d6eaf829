"""A predictor behind an OpenAI-compatible server: OpenAI, vLLM, llama.cpp, `transformers serve`.

Uses prompts, and the client beside it. Questions are asked by a pool of threads, so that none waits
for another. A question that is refused is kept as failed, and the run goes on; a fault of the whole
run ends it with one line.
"""

import contextlib
import itertools
import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Literal

from llama_squad.decoding.replies import Reply
from llama_squad.predictors.base import Batch, Prediction
from llama_squad.predictors.client import BACKOFF_S, Client, QuestionFailed, one_line, say
from llama_squad.prompts import SYSTEM_PROMPT, Record, build_messages

FAILURES_SHOWN = 5
"""So many failed questions are shown with their reason; all have it in the result file."""


class ServerModel:
    """A chat model behind an OpenAI-compatible server.

    The key is read from the environment variable OPENAI_API_KEY.

    Args:
        model_name: the server's name of the model.
        base_url: such as http://localhost:8000/v1; None for OpenAI's.
        prompt, system_prompt: as ``LocalModel`` has them.
        max_new_tokens: length limit of a reply.
        temperature: 0 for the likeliest tokens.
        timeout: seconds to wait for a reply.
        concurrency: questions asked at once.
        max_tokens_name: the request's field for ``max_new_tokens``; None to find out.
        structured_output: ask the server to hold the last reply to ``ANSWER_SCHEMA``.
        backoff_s: see ``BACKOFF_S``.

    Raises:
        ValueError: the openai package is not installed; OpenAI is asked without a key.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        *,
        prompt: str = "single_turn",
        system_prompt: str = SYSTEM_PROMPT,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        timeout: float = 600.0,
        concurrency: int = 32,
        max_tokens_name: Literal["max_tokens", "max_completion_tokens"] | None = None,
        structured_output: bool = False,
        backoff_s: float = BACKOFF_S,
    ) -> None:
        self._client = Client(
            model_name, base_url, max_new_tokens=max_new_tokens, temperature=temperature,
            timeout=timeout, max_tokens_name=max_tokens_name, backoff_s=backoff_s,
        )  # fmt: skip
        self._prompt, self._system_prompt = prompt, system_prompt
        self._concurrency, self._structured = concurrency, structured_output

    def answer_all(self, records: Sequence[Record]) -> Iterator[list[Prediction]]:
        """Answer records, and yield the predictions as they come, in whatever order.

        A question that is refused for good is among them, with the reason as its ``failure``. At
        the end the tokens used and the number of failed questions are printed.

        Raises:
            ValueError: the server refuses all, cannot be reached, or answers something else.
        """
        self._client.begin()
        todo: SimpleQueue[Record] = SimpleQueue()
        for record in records:
            todo.put(record)
        known: SimpleQueue[Prediction | Exception] = SimpleQueue()
        # Daemons: at a fault of the whole run, or at Ctrl-C, nothing waits for the other requests.
        for _ in range(min(self._concurrency, len(records))):
            threading.Thread(target=self._work, args=(todo, known), daemon=True).start()
        failures: list[str] = []
        try:
            left = len(records)
            while left:
                items = [known.get()]
                with contextlib.suppress(Empty):
                    while True:
                        items.append(known.get_nowait())
                predictions = [item for item in items if isinstance(item, Prediction)]
                left -= len(predictions)
                failures += self._failures(predictions, len(failures))
                if predictions:
                    yield predictions
                for item in items:
                    if isinstance(item, Exception):
                        raise item
        finally:
            self._client.ended.set()
            self._say_end(failures, len(records))

    def answer(self, batch: Batch) -> list[Prediction]:
        """Answer the records of several paragraphs, in order; see ``answer_all``."""
        records = list(itertools.chain.from_iterable(batch))
        known = {p.record["id"]: p for part in self.answer_all(records) for p in part}
        return [known[record["id"]] for record in records]

    def _work(self, todo: "SimpleQueue[Record]", known: "SimpleQueue[Any]") -> None:
        """Answer one question after the other, until none is left or the run ends."""
        while not self._client.ended.is_set():
            try:
                record = todo.get_nowait()
            except Empty:
                return
            try:
                known.put(self._ask(record))
            except Exception as error:
                known.put(error)
                return

    def _failures(self, predictions: Sequence[Prediction], before: int) -> list[str]:
        """Return the reasons of failed questions, and show the first few."""
        failed = [prediction for prediction in predictions if prediction.failure]
        for prediction in failed[: max(0, FAILURES_SHOWN - before)]:
            say(f"Question {prediction.record['id']} failed: {prediction.failure}")
        return [prediction.failure for prediction in failed]

    def _say_end(self, failures: Sequence[str], count: int) -> None:
        if self._client.tally.replies:
            say(str(self._client.tally))
        if failures:
            kinds = Counter(failure.partition(":")[0] for failure in failures)
            parts = ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common())
            say(
                f"{len(failures):,} of {count:,} questions failed ({parts}): the result file has "
                "the reasons, and the same command asks them again."
            )

    def _ask(self, record: Record) -> Prediction:
        messages = build_messages(record, self._prompt, self._system_prompt, answer=False)
        completion = failure = ""
        try:
            for turn, message in enumerate(messages):
                if message["role"] == "assistant":
                    said = self._reply(messages[:turn]).strip()
                    # half a character, which a cut may leave, cannot be sent back
                    message["content"] = said.encode("utf-8", "replace").decode()
            completion = self._reply(messages, last=True)
        except QuestionFailed as error:
            failure = str(error)
        text = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
        return Prediction(record, text, Reply(completion, [], None), failure)

    def _reply(self, messages: Any, last: bool = False) -> str:
        """Return what the model says to a conversation.

        Raises:
            QuestionFailed: it refuses, the content is filtered, or there is none.
            ValueError: a fault of the whole run.
        """
        structured = last and self._structured
        done = self._client.complete(messages, structured)
        try:
            choice = done.choices[0]
            content, reason = choice.message.content, choice.finish_reason
            refusal = getattr(choice.message, "refusal", None)
            if not isinstance(content, str | None):
                raise TypeError(f"content is of type {type(content).__name__}")
        except (AttributeError, IndexError, TypeError) as error:
            if self._client.tally.is_over():
                raise ValueError(self._client.no_completion(error)) from error
            said = getattr(done, "error", None) or error  # of a gateway, with status 200
            raise QuestionFailed(f"no completion: {one_line(str(said))}") from error
        self._client.tally.add(done.usage)
        if reason == "length":
            self._client.tally.say_once(
                "A reply was cut off at --max_new_tokens: give more if the model thinks first."
            )
        if refusal:
            raise QuestionFailed(f"refusal: {one_line(refusal)}")
        if reason == "content_filter":
            raise QuestionFailed("content filter: the reply was withheld")
        if content is None:
            raise QuestionFailed(f"no content: the reply is null (finish_reason {reason})")
        if structured and reason != "length" and not _is_json(content):
            self._client.tally.say_once(
                "The server does not hold replies to the JSON schema of --structured_output."
            )
        return content


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
