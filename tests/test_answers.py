"""The answer format and its parser, on what models really say and on what they might."""

import json
import random

import pytest

from llama_squad.answers import (
    MALFORMED_PREDICTION,
    NO_ANSWER,
    Answer,
    answer_is_closed,
    extract_answer,
    format_answer,
)
from llama_squad.metrics import score_answer

MALFORMED = Answer("malformed", "")
ABSTAINED = Answer("no_answer", "?")

HARD_TEXTS = [
    "in the late 1990s",
    "Beyoncé Giselle Knowles-Carter",
    'the "Iron" Duke',
    "C:\\temp\\new",
    "a } b { c",
    '{"answer": "inner"}',
    "```json",
    "line one\nline two\ttabbed\r\nthree",
    "\x00\x1f\u2028\u2029",
    "日本語 🦙",
    " leading and trailing ",
    "what?",
]


def test_format_is_the_designs() -> None:
    assert format_answer("Beyoncé") == '```json\n{\n  "answer": "Beyoncé"\n}\n```'


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_an_answer_survives_word_for_word(text: str) -> None:
    assert extract_answer(format_answer(text)) == Answer("answer", text)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (format_answer(NO_ANSWER), ABSTAINED),
        ('{"answer": " ? "}', ABSTAINED),
        ('{"answer": "??"}', Answer("answer", "??")),
        ('{"answer": ""}', Answer("answer", "")),
        # reasoning before, chatter after
        ("Let me see {the context}: " + format_answer("Paris"), Answer("answer", "Paris")),
        (format_answer("Paris") + " Hope {that} helps!", Answer("answer", "Paris")),
        # a draft outside of the fence does not beat the answer in it
        ('Perhaps {"answer": "Rome"}. ' + format_answer("Paris"), Answer("answer", "Paris")),
        # but it counts where the fence holds none
        ('{"answer": "Rome"} ```json\nnothing\n```', Answer("answer", "Rome")),
        # broken JSON, then a valid one
        (
            '```json\n{"answer": "Ro\n```\n```json\n{"answer": "Paris"}```',
            Answer("answer", "Paris"),
        ),
        ('{"answer": Rome} {"answer": "Paris"}', Answer("answer", "Paris")),
        ('{{{"answer": "Paris"}}}', Answer("answer", "Paris")),
        ('{"thought": 1} {"answer": "Paris"}', Answer("answer", "Paris")),
        ('{"why": {"answer_start": 3}, "answer": "Paris"}', Answer("answer", "Paris")),
        # fences and line ends
        ('```json\r\n{\r\n  "answer": "Paris"\r\n}\r\n```', Answer("answer", "Paris")),
        ('```\n{"answer": "Paris"}\n```', Answer("answer", "Paris")),
        ('```json{"answer":"Paris"}', Answer("answer", "Paris")),
        ('{"answer": "Beyonc\\u00e9"}', Answer("answer", "Beyoncé")),
        ('{"answer": "\\ud83e\\udd99"}', Answer("answer", "🦙")),
        # not an answer, and not an abstention either
        ("", MALFORMED),
        ("?", MALFORMED),
        ("Paris", MALFORMED),
        ('{"answer": "Paris"', MALFORMED),
        ('{"answer": "Par\nis"}', MALFORMED),
        ("{'answer': 'Paris'}", MALFORMED),
        ('["answer", "Paris"]', MALFORMED),
        ('{"Answer": "Paris"}', MALFORMED),
        ('{"answer": null}', MALFORMED),
        ('{"answer": 7}', MALFORMED),
        ('{"answer": ["Paris"]}', MALFORMED),
        ('{"answer": {"answer": "Paris"}}', MALFORMED),
        ('{"answer": "\\ud800"}', MALFORMED),  # a lone surrogate
        ('{"year": ' + "1" * 5000 + "}", MALFORMED),  # beyond Python's limit of digits
        ('{"a":' * 3000, MALFORMED),  # nested deeper than the decoder goes
        ('{"a":' * 3000 + "1" + "}" * 3000 + ' {"answer": "Paris"}', Answer("answer", "Paris")),
    ],
)
def test_replies(completion: str, expected: Answer) -> None:
    assert extract_answer(completion) == expected


def test_a_huge_number_does_not_hide_the_answer_after_it() -> None:
    completion = '{"year": ' + "1" * 5000 + "} " + format_answer("Paris")
    assert extract_answer(completion) == Answer("answer", "Paris")


DRAFT, REPLY = format_answer("Rome"), format_answer("Paris")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (f"<think>\nMaybe {DRAFT}?</think>\n\n{REPLY}", Answer("answer", "Paris")),
        ('<think>Say {"answer": "?"}.</think>{"answer": "Paris"}', Answer("answer", "Paris")),
        (f"Maybe {DRAFT}?</think>\n{REPLY}", Answer("answer", "Paris")),  # the prompt opened it
        (f"<think>Maybe {DRAFT}? </think> No.", MALFORMED),
        ('<think>If absent I say {"answer": "?"}. Now', MALFORMED),
        (f"<think>x</think>{format_answer('a</think>b')}", Answer("answer", "a</think>b")),
        (format_answer("a</think>b"), Answer("answer", "a</think>b")),
        (format_answer("a</think>b") + '{"answer": "z"}', Answer("answer", "a</think>b")),
        (format_answer("<think>"), Answer("answer", "<think>")),
    ],
)
def test_drafts_of_a_reasoning_are_no_answers(completion: str, answer: Answer) -> None:
    assert extract_answer(completion) == answer


def test_official_text_of_each_state() -> None:
    assert Answer("answer", "Paris").official == "Paris"
    assert ABSTAINED.official == ""
    assert MALFORMED.official == MALFORMED_PREDICTION
    # An empty or blank answer is no abstention, and must not score as one.
    assert Answer("answer", "").official == MALFORMED_PREDICTION
    assert Answer("answer", " \n").official == MALFORMED_PREDICTION


def test_a_malformed_reply_is_wrong_everywhere() -> None:
    for golds in ([], ["malformed"], ["the malformed one"], ["?"]):
        assert score_answer(MALFORMED_PREDICTION, golds) == (0, 0.0)


def test_format_and_json_agree_on_the_string() -> None:
    body = format_answer('a "b" \\ c').removeprefix("```json\n").removesuffix("\n```")
    assert json.loads(body) == {"answer": 'a "b" \\ c'}


# Where a reply may end -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "closed"),
    [
        (format_answer("Paris"), True),
        (format_answer("?"), True),
        ("I think so.\n" + format_answer("a ``` and a }") + "\n\nThat is", True),
        ('```json\n{"answer": "x"}```', True),
        (f"<think>{DRAFT}", False),
        (f"<think>{DRAFT}</think>", False),
        (f"<think>{DRAFT}</think>{REPLY}", True),
        (format_answer("Paris")[:-1], False),
        ("```json", False),
        ("```json\n```", False),
        ('```json\n{"answer": 7}\n```', False),  # an object that holds an answer may follow
        ('{"answer": "Paris"}', False),  # one in a fence may follow
        ('{"answer": "Paris"}\n```json', False),
        ('```\n{"answer": "Paris"}\n```', False),
        ('```json\n{"answer": "Paris"}\nThat is it.\n```', False),
        ('```json\n{"a": {"answer": "Paris"}, "b": "```', False),  # part of a larger object
    ],
)
def test_where_the_answer_is_closed(completion: str, closed: bool) -> None:
    assert answer_is_closed(completion) is closed


@pytest.mark.slow
def test_what_follows_a_closed_answer_does_not_count() -> None:
    pieces = ["```json", "```", "``", "`", "\n", "{", "}", '"', '{"answer": "', "Paris", '"}', "?",
              ", ", ': "', '"a": ', "[", "]", '{"answer": "b"}', "\\"]  # fmt: skip
    closed = 0
    rng = random.Random(5)
    for _ in range(20_000):
        reply = "```json\n" * (rng.random() < 0.7) + "".join(rng.choices(pieces, k=14))
        ends = [end for end in range(len(reply)) if answer_is_closed(reply[:end])]
        if ends:
            closed += 1
            assert extract_answer(reply[: ends[0]]) == extract_answer(reply), reply
    assert closed > 500
