"""A predictor behind an OpenAI-compatible server: OpenAI, vLLM, llama.cpp, `transformers serve`.

Uses prompts and the answer format; the client (package ``openai``) is loaded where it is needed.
Questions are asked by a pool of threads, so that none waits for another. What fails is told apart
by whose fault it is: a question that is refused is kept as failed, and the run goes on; a fault of
the whole run (key, address, quota, a server that stays down) ends it with one line.
"""

import contextlib
import itertools
import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Literal

from tqdm import tqdm

from llama_squad.answers import ANSWER_SCHEMA
from llama_squad.decoding.replies import Reply
from llama_squad.predictors.base import Batch, Prediction, Record
from llama_squad.prompts import SYSTEM_PROMPT, build_messages

OPENAI_URL = "https://api.openai.com/v1"

RETRIES = 10
"""So often a request is repeated: for about 150 s, in which a server can be started again."""
TIMEOUT_RETRIES = 2
"""The same after a timeout, which has cost ``--timeout`` seconds already."""
BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 30.0
"""Seconds before the first repetition, doubled before each further one, and their limit."""
LONGEST_WAIT_S = 600.0
"""A server that asks for a longer wait (``Retry-After``) is not waited for."""
NOTICE_INTERVAL_S = 5.0
"""Seconds between two lines about requests that are repeated."""
FAILURES_SHOWN = 5
"""So many failed questions are shown with their reason; all have it in the result file."""

_ANOTHER_LIMIT = {
    "max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"
}  # fmt: skip
_OWN_OPTIONS = re.compile(
    rf"temperature|response_format|{'|'.join(_ANOTHER_LIMIT)}"
    r"|(unknown|invalid|no such) model|\bmodel\b.*\bnot (found|exist)",
    re.IGNORECASE,
)
_OF_THE_QUESTION = re.compile(r"context|content|filter|flagged|moderat|too long", re.IGNORECASE)
"""Of a refusal for its length or its content, which may name the model or the limit, too."""
_KEPT = "What was answered is kept: the same command goes on from there"


class _QuestionFailed(Exception):
    """A question that gets no reply, "kind: reason", while others may."""


@dataclass
class _Tally:
    """What the threads have had from the server so far."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    replies: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    uncounted: int = 0
    given_up: int = 0
    """Questions given up since the last reply."""
    said: set[str] = field(default_factory=set)
    next_notice: float = 0.0

    def add(self, usage: Any) -> None:
        """Count a reply and its tokens; ``usage`` is None where the server does not tell."""
        with self.lock:
            self.replies += 1
            self.given_up = 0
            self.tokens_in += getattr(usage, "prompt_tokens", None) or 0
            self.tokens_out += getattr(usage, "completion_tokens", None) or 0
            self.uncounted += usage is None

    def say_once(self, text: str) -> None:
        with self.lock:
            new = text not in self.said
            self.said.add(text)
        if new:
            _say(text)

    def notice(self, text: str) -> None:
        """Say what the run waits for, but not for every thread that waits."""
        with self.lock:
            now = time.monotonic()
            due = now >= self.next_notice
            if due:
                self.next_notice = now + NOTICE_INTERVAL_S
        if due:
            _say(text)

    def __str__(self) -> str:
        text = f"Tokens: {self.tokens_in:,} in, {self.tokens_out:,} out"
        return text + f" ({self.uncounted:,} replies did not say)." * bool(self.uncounted)


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # above a bar, if there is one


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
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ValueError(
                "--predictor server needs its client: pip install -r requirements-predictors.txt"
            ) from error
        self._url = base_url or OPENAI_URL  # given, so that no variable redirects it unseen
        self._client = OpenAI(
            api_key=_key(base_url), base_url=self._url, timeout=timeout, max_retries=0
        )
        self._options = {"model": model_name, "temperature": temperature}
        self._limit, self._find_limit_name = max_new_tokens, max_tokens_name is None
        newer = max_tokens_name is None and base_url is None  # OpenAI's own
        self._limit_name: str = max_tokens_name or (
            "max_completion_tokens" if newer else "max_tokens"
        )
        self._prompt, self._system_prompt = prompt, system_prompt
        self._timeout, self._concurrency = timeout, concurrency
        self._structured, self._backoff_s = structured_output, backoff_s
        self._who = f"{self._url} (model {model_name!r})"
        self._tally = _Tally()
        self._stop = threading.Event()

    def answer_all(self, records: Sequence[Record]) -> Iterator[list[Prediction]]:
        """Answer records, and yield the predictions as they come, in whatever order.

        A question that is refused for good is among them, with the reason as its ``failure``. At
        the end the tokens used and the number of failed questions are printed.

        Raises:
            ValueError: the server refuses all, cannot be reached, or answers something else.
        """
        self._tally, self._stop = _Tally(), threading.Event()
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
            self._stop.set()
            self._say_end(failures, len(records))

    def answer(self, batch: Batch) -> list[Prediction]:
        """Answer the records of several paragraphs, in order; see ``answer_all``."""
        records = list(itertools.chain.from_iterable(batch))
        known = {p.record["id"]: p for part in self.answer_all(records) for p in part}
        return [known[record["id"]] for record in records]

    def _work(self, todo: "SimpleQueue[Record]", known: "SimpleQueue[Any]") -> None:
        """Answer one question after the other, until none is left or the run ends."""
        while not self._stop.is_set():
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
            _say(f"Question {prediction.record['id']} failed: {prediction.failure}")
        return [prediction.failure for prediction in failed]

    def _say_end(self, failures: Sequence[str], count: int) -> None:
        if self._tally.replies:
            _say(str(self._tally))
        if failures:
            kinds = Counter(failure.partition(":")[0] for failure in failures)
            parts = ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common())
            _say(
                f"{len(failures):,} of {count:,} questions failed ({parts}): the result file has "
                "the reasons, and the same command asks them again."
            )

    def _ask(self, record: Record) -> Prediction:
        messages = build_messages(record, self._prompt, self._system_prompt, answer=False)
        completion = failure = ""
        try:
            for turn, message in enumerate(messages):
                if message["role"] == "assistant":
                    message["content"] = self._reply(messages[:turn]).strip()
            completion = self._reply(messages, last=True)
        except _QuestionFailed as error:
            failure = str(error)
        text = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
        return Prediction(record, text, Reply(completion, [], None), failure)

    def _reply(self, messages: Any, last: bool = False) -> str:
        """Return what the model says to a conversation.

        Raises:
            _QuestionFailed: it refuses, the content is filtered, or there is none.
            ValueError: a fault of the whole run.
        """
        structured = last and self._structured
        done = self._request(messages, structured)
        try:
            choice = done.choices[0]
            content, reason = choice.message.content, choice.finish_reason
            refusal = getattr(choice.message, "refusal", None)
            if not isinstance(content, str | None):
                raise TypeError(f"content is of type {type(content).__name__}")
        except (AttributeError, IndexError, TypeError) as error:
            raise ValueError(self._no_completion(error)) from error
        self._tally.add(done.usage)
        if reason == "length":
            self._tally.say_once(
                "A reply was cut off at --max_new_tokens: give more if the model thinks first."
            )
        if refusal:
            raise _QuestionFailed(f"refusal: {_one_line(refusal)}")
        if reason == "content_filter":
            raise _QuestionFailed("content filter: the reply was withheld")
        if content is None:
            raise _QuestionFailed(f"no content: the reply is null (finish_reason {reason})")
        if structured and reason != "length" and not _is_json(content):
            self._tally.say_once(
                "The server does not hold replies to the JSON schema of --structured_output."
            )
        return content

    def _no_completion(self, error: Exception) -> str:
        return (
            f"{self._who} answers with something that is no chat completion ({error}): does "
            f"--base_url end where the API begins, as in http://localhost:8000/v1? {_KEPT}"
        )

    def _request(self, messages: Any, structured: bool) -> Any:
        """Send a request, and again where that may help. Raises as ``_reply`` does."""
        from openai import APIError

        replies_before: int | None = None
        attempt, delay = 0, 0.0
        while not self._stop.wait(delay):
            attempt += 1
            try:
                return self._send_with_limit(messages, structured)
            except APIError as error:
                if replies_before is None:
                    replies_before = self._tally.replies
                delay = self._delay(error, attempt, replies_before)
            except ValueError as error:  # no JSON
                raise ValueError(self._no_completion(error)) from error
        raise ValueError("the run has ended")  # nobody listens

    def _send_with_limit(self, messages: Any, structured: bool) -> Any:
        """Send a request; where the limit's name is not known, try the other one, and keep it."""
        from openai import BadRequestError, UnprocessableEntityError

        refused, name = (BadRequestError, UnprocessableEntityError), self._limit_name
        try:
            return self._send(messages, structured, name)
        except refused as error:
            if not self._find_limit_name or name not in str(error):
                raise
            try:
                done = self._send(messages, structured, _ANOTHER_LIMIT[name])
            except refused:
                raise error from None  # it was not the name
        self._limit_name = _ANOTHER_LIMIT[name]
        return done

    def _send(self, messages: Any, structured: bool, limit_name: str) -> Any:
        options: dict[str, Any] = self._options | {limit_name: self._limit}
        if structured:
            schema = {"name": "answer", "strict": True, "schema": ANSWER_SCHEMA}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        return self._client.chat.completions.create(messages=messages, **options)

    def _delay(self, error: Any, attempt: int, replies_before: int) -> float:
        """Return the seconds after which to repeat a request that failed.

        Args:
            error: the client's.
            attempt: how often it was sent.
            replies_before: how many replies there were when it failed first.

        Raises:
            _QuestionFailed: others were answered meanwhile, or this one only is refused.
            ValueError: repeating does not help, nor would asking anything else.
        """
        from openai import APITimeoutError

        status = getattr(error, "status_code", None)
        timed_out = isinstance(error, APITimeoutError)
        reason = _reason(error)
        if status in (400, 413, 422) and not self._is_our_option(error):
            raise _QuestionFailed(reason)
        if status == 403 and _OF_THE_QUESTION.search(reason):
            raise _QuestionFailed(reason)
        wait = _retry_after(error)
        spent = error.code == "insufficient_quota" or error.type == "insufficient_quota"
        may_pass = status is None or status in (408, 409, 429) or status >= 500
        if spent or not may_pass or wait > LONGEST_WAIT_S:
            raise ValueError(f"{self._who} does not answer: {reason}. {_KEPT}") from error
        retries = TIMEOUT_RETRIES if timed_out else RETRIES
        if attempt > retries:
            with self._tally.lock:
                first = self._tally.given_up == 0
                self._tally.given_up += 1
            alive = timed_out or (status or 0) >= 500
            if self._tally.replies > replies_before or (first and alive):
                raise _QuestionFailed(f"{reason} ({attempt} times)")
            raise ValueError(
                f"{self._who} does not answer: {reason}"
                + "; --timeout waits longer, a smaller --concurrency asks for less at once"
                * timed_out
                + f". {_KEPT}"
            ) from error
        delay = max(wait, min(self._backoff_s * 2 ** (attempt - 1), LONGEST_BACKOFF_S))
        if not self._stop.is_set():
            self._tally.notice(
                f"{self._who}: {reason}. Trying again in {delay:.1f} s ({attempt} of {retries})."
            )
        return delay

    def _is_our_option(self, error: Any) -> bool:
        """Tell whether a request is refused for what all requests have in common."""
        if error.code in ("unsupported_parameter", "unsupported_value", "model_not_found"):
            return True
        if error.param in ("model", "temperature", "response_format"):
            return True
        # Servers that give no code say it in words, which a question may hold, too.
        words = _reason(error)
        if self._tally.replies or _OF_THE_QUESTION.search(words):
            return False
        return bool(_OWN_OPTIONS.search(words))


def _key(base_url: str | None) -> str:
    """Return the key to send. Raises ValueError where it is missing or damaged."""
    key = os.environ.get("OPENAI_API_KEY")
    if not key and not base_url:
        raise ValueError(
            "OpenAI asks for a key: set OPENAI_API_KEY, or name another server with --base_url"
        )
    if key and not (key.isascii() and key.isprintable()):
        raise ValueError("OPENAI_API_KEY holds a character that no key has: copy it again")
    return key or "none"


def _reason(error: Any) -> str:
    """Say in one line what the client's error is about, as "kind: message"."""
    status = getattr(error, "status_code", None)
    if status is None:
        cause = str(error.__cause__ or "")
        return "connection: " + _one_line(f"{error.message.rstrip('.')} {cause and f'({cause})'}")
    body = error.body if isinstance(error.body, dict) else {}
    said = body.get("message") or body.get("detail") or body.get("error")
    message = said or error.response.text or error.message
    return f"{status} {error.code or ''}".strip() + f": {_one_line(message)}"


def _retry_after(error: Any) -> float:
    """Return the seconds that the server asks to wait; 0 where it does not say."""
    response = getattr(error, "response", None)
    headers = response.headers if response is not None else {}
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return float(headers[name]) * unit
        except (KeyError, ValueError):  # a date may stand there, too
            continue
    return 0.0


def _one_line(text: Any, length: int = 500) -> str:
    return " ".join(str(text).split())[:length].rstrip(".")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
