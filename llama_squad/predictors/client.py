"""The client of an OpenAI-compatible server: requests, what is tried again, and what failed.

Tells apart by whose fault a failure is: a question that is refused (``QuestionFailed``), or a fault
of the whole run (key, address, quota, a server that stays down). The package ``openai`` is loaded
where it is needed.
"""

import os
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from tqdm import tqdm

from llama_squad.answers import ANSWER_SCHEMA

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


class QuestionFailed(Exception):
    """A question that gets no reply, "kind: reason", while others may."""


@dataclass
class Tally:
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

    def is_over(self) -> bool:
        """Tell, of something that is no reply, whether there were none yet, or none for long."""
        with self.lock:
            self.given_up += 1
            return not self.replies or self.given_up > RETRIES

    def say_once(self, text: str) -> None:
        with self.lock:
            new = text not in self.said
            self.said.add(text)
        if new:
            say(text)

    def notice(self, text: str) -> None:
        """Say what the run waits for, but not for every thread that waits."""
        with self.lock:
            now = time.monotonic()
            due = now >= self.next_notice
            if due:
                self.next_notice = now + NOTICE_INTERVAL_S
        if due:
            say(text)

    def __str__(self) -> str:
        text = f"Tokens: {self.tokens_in:,} in, {self.tokens_out:,} out"
        return text + f" ({self.uncounted:,} replies did not say)." * bool(self.uncounted)


def say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # above a bar, if there is one


class Client:
    """A model behind a server, which many threads ask at once.

    The arguments are those of ``ServerModel``.

    Raises:
        ValueError: the openai package is not installed; OpenAI is asked without a key.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None,
        *,
        max_new_tokens: int,
        temperature: float,
        timeout: float,
        max_tokens_name: Literal["max_tokens", "max_completion_tokens"] | None,
        backoff_s: float,
    ) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ValueError(
                "--predictor server needs its client: pip install -r requirements-predictors.txt"
            ) from error
        url = base_url or OPENAI_URL  # given, so that no variable redirects it unseen
        self._openai = OpenAI(api_key=_key(base_url), base_url=url, timeout=timeout, max_retries=0)
        self._options = {"model": model_name, "temperature": temperature}
        self._limit, self._find_limit_name = max_new_tokens, max_tokens_name is None
        newer = max_tokens_name is None and base_url is None  # OpenAI's own
        self._limit_name: str = max_tokens_name or (
            "max_completion_tokens" if newer else "max_tokens"
        )
        self._backoff_s = backoff_s
        self._who = f"{url} (model {model_name!r})"
        self.begin()

    def begin(self) -> None:
        """Begin a run: nothing is counted yet, and it has not ended."""
        self.tally, self.ended = Tally(), threading.Event()

    def no_completion(self, error: Exception) -> str:
        return (
            f"{self._who} answers with something that is no chat completion ({error}): does "
            f"--base_url end where the API begins, as in http://localhost:8000/v1? {_KEPT}"
        )

    def complete(self, messages: Any, structured: bool) -> Any:
        """Send a request, and again where that may help. Raises as ``_delay`` does."""
        from openai import APIError

        replies_before: int | None = None
        attempt, delay = 0, 0.0
        while not self.ended.wait(delay):
            attempt += 1
            try:
                return self._send_with_limit(messages, structured)
            except APIError as error:
                if replies_before is None:
                    replies_before = self.tally.replies
                delay = self._delay(error, attempt, replies_before)
            except ValueError as error:  # no JSON
                raise ValueError(self.no_completion(error)) from error
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
            other = _ANOTHER_LIMIT[name]
            try:
                done = self._send(messages, structured, other)
            except refused as second:
                unknown = other in str(error) or error.code == "unsupported_parameter"
                if not unknown or other in str(second) or name in str(second):
                    raise error from None  # it was not the name
                self._limit_name = other  # it was, and the question is refused for itself
                raise second from None
        self._limit_name = other
        return done

    def _send(self, messages: Any, structured: bool, limit_name: str) -> Any:
        options: dict[str, Any] = self._options | {limit_name: self._limit}
        if structured:
            schema = {"name": "answer", "strict": True, "schema": ANSWER_SCHEMA}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        return self._openai.chat.completions.create(messages=messages, **options)

    def _delay(self, error: Any, attempt: int, replies_before: int) -> float:
        """Return the seconds after which to repeat a request that failed.

        Args:
            error: the client's.
            attempt: how often it was sent.
            replies_before: how many replies there were when it failed first.

        Raises:
            QuestionFailed: others were answered meanwhile, or this one only is refused.
            ValueError: repeating does not help, nor would asking anything else.
        """
        from openai import APITimeoutError

        status = getattr(error, "status_code", None)
        timed_out = isinstance(error, APITimeoutError)
        reason = _reason(error)
        if status in (400, 413, 422) and not self._is_our_option(error):
            raise QuestionFailed(reason)
        if status == 403 and _OF_THE_QUESTION.search(reason):
            raise QuestionFailed(reason)
        wait = _retry_after(error)
        spent = error.code == "insufficient_quota" or error.type == "insufficient_quota"
        may_pass = status is None or status in (408, 409, 429) or status >= 500
        if spent or not may_pass or wait > LONGEST_WAIT_S:
            raise ValueError(f"{self._who} does not answer: {reason}. {_KEPT}") from error
        retries = TIMEOUT_RETRIES if timed_out else RETRIES
        if attempt > retries:
            with self.tally.lock:
                first = self.tally.given_up == 0
                self.tally.given_up += 1
            alive = timed_out or (status or 0) >= 500
            if self.tally.replies > replies_before or (first and alive):
                raise QuestionFailed(f"{reason} ({attempt} times)")
            raise ValueError(
                f"{self._who} does not answer: {reason}"
                + "; --timeout waits longer, a smaller --concurrency asks for less at once"
                * timed_out
                + f". {_KEPT}"
            ) from error
        delay = max(wait, min(self._backoff_s * 2 ** (attempt - 1), LONGEST_BACKOFF_S))
        if not self.ended.is_set():
            self.tally.notice(
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
        if self.tally.replies or _OF_THE_QUESTION.search(words):
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
        return "connection: " + one_line(f"{error.message.rstrip('.')} {cause and f'({cause})'}")
    body = error.body if isinstance(error.body, dict) else {}
    said = body.get("message") or body.get("detail") or body.get("error")
    message = said or error.response.text or error.message
    return f"{status} {error.code or ''}".strip() + f": {one_line(message)}"


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


def one_line(text: Any) -> str:
    return " ".join(str(text).split())[:500].rstrip(".")
