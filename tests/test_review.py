"""What is reviewed, in which order, and what a window does: without a browser."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import dataset_folder, make_records

from llama_squad.answers import MALFORMED, Answer
from llama_squad.arguments import AppArguments
from llama_squad.calibration import Calibration
from llama_squad.config import write_json
from llama_squad.feedback import queue, verdicts
from llama_squad.feedback.queue import CHUNK, Doubt, Item, ReviewQueue, doubt
from llama_squad.page.desk import Answering, Desk
from llama_squad.page.review import show, why_here
from llama_squad.page.seat import Review, new_seat
from llama_squad.page.sources import SPLIT_LABEL, Sources
from llama_squad.reader import Reading, SpanAnswer
from llama_squad.results import ResultsFile
from llama_squad.rows import make_row

RECORDS = make_records(30, [3], seed=3)


class Reads:
    """Stands for a Reader: the first word, with the na_prob of each question as told."""

    def __init__(self, na_probs: Mapping[str, float]) -> None:
        self.na_probs, self.asked = na_probs, 0

    def read(self, records: Sequence[Mapping[str, Any]]) -> list[Reading]:
        self.asked += len(records)
        return [self._read(record) for record in records]

    def _read(self, record: Mapping[str, Any]) -> Reading:
        word = record["context"].split()[0]
        span = SpanAnswer(word, 0, len(word), -0.1)
        return Reading(word, 0, len(word), self.na_probs.get(record["id"], 0.01), -0.1, (span,))


def make_desk(folder: Path, na_probs: Mapping[str, float], **args: Any) -> Desk:
    session: Any = SimpleNamespace(model=None)
    arguments = AppArguments(feedback=str(folder / "feedback.jsonl"), **args)
    return Desk(Reads(na_probs), session, arguments, 0.5, Answering("tiny", "", "d1", None))


# What is worth a look ------------------------------------------------------------------------


def test_errors_come_first_then_what_the_model_is_unsure_of() -> None:
    sure, near = doubt(1e-6, 0.5, [-0.1, -9], None), doubt(0.45, 0.5, [-0.1, -9], None)
    torn, wrong = doubt(1e-6, 0.5, [-1.0, -1.1], None), doubt(1e-6, 0.5, [-0.1, -9], False)
    unsure_wrong = doubt(0.45, 0.5, [-0.1, -9], False)
    order = sorted([sure, near, torn, wrong, unsure_wrong], key=lambda d: -d.worth)
    assert order == [unsure_wrong, wrong, torn, near, sure]
    assert (near.why, torn.why) == (
        "whether there is an answer is nearly undecided", "two answers are nearly as likely",
    )  # fmt: skip
    assert (sure.why, wrong.why) == ("the model is sure", "the dataset has another answer")
    # near the threshold that is tuned, and not near one half
    assert doubt(0.03, 0.02, [], None).worth > doubt(0.5, 0.02, [], None).worth
    assert doubt(None, 0.5, [], None) == Doubt(0.0, "the model is sure")


def test_windows_do_not_get_the_same_question() -> None:
    items = [Item(r, Doubt(n / 100, "")) for n, r in enumerate(RECORDS[:4])]
    review = ReviewQueue(items)
    keys = [item.key for item in reversed(items)]
    one, two = review.next("one", set()), review.next("two", set())
    assert one and two and [one.key, two.key] == keys[:2]
    assert review.next("one", set()) == one  # it has not been judged
    third = review.next("one", {keys[0]})
    assert third and third.key == keys[2]
    back = review.next("two", {keys[0], keys[1]}, again=keys[1])
    assert back and back.key == keys[1]
    assert review.next("two", set(keys)) is None
    first = review.next("three", set(keys[1:]))
    assert first and first.key == keys[0]


def test_unread_questions_are_read_a_chunk_at_a_time() -> None:
    read = []

    def weigh(records: Sequence[Mapping[str, Any]]) -> list[Doubt]:
        read.append(len(records))
        return [Doubt(int(r["id"].split("-")[1]), "") for r in records]

    review = ReviewQueue(unread=RECORDS, weigh=weigh)
    seen: set[verdicts.Key] = set()
    order = []
    while (item := review.next("w", seen)) is not None:
        seen.add(item.key)
        order.append(item.doubt.worth)
    assert len(order) == len(review) == len(RECORDS)
    assert read == [CHUNK, CHUNK, len(RECORDS) - 2 * CHUNK]
    assert order[0] == 10  # the best of the first chunk


# Sources -------------------------------------------------------------------------------------


def result_file(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    with ResultsFile(path, {}) as file:
        file.append([
            make_row(r, "", Answer("answer", text), "", na_prob, best_span=text,
                     best_span_log_prob=-0.1,
                     no_answer_log_prob=-0.1 + math.log(na_prob / (1 - na_prob)))
            for n, r in enumerate(records)
            for text, na_prob in [(r["answers"]["text"][0] if n else "nonsense", 0.4 if n == 2 else 0.01)]
        ])  # fmt: skip


def test_a_result_file_is_ranked_as_a_whole(tmp_path: Path) -> None:
    answerable = [r for r in RECORDS if r["answers"]["text"]]
    data = dataset_folder(tmp_path, RECORDS)
    path = tmp_path / "results.csv"
    result_file(path, answerable[:9])
    desk = make_desk(tmp_path, {}, dataset_name=data, review=str(path))
    sources = Sources(desk)
    assert sources.names() == [
        str(path), *(SPLIT_LABEL.format(name, data) for name in ("val", "test", "train"))
    ]  # fmt: skip
    review = sources.get(str(path))
    assert len(review) == 9
    first = review.next("w", set())
    assert first and first.key == (answerable[0]["id"], answerable[0]["context"],
                                   answerable[0]["question"])  # fmt: skip
    assert first.said == Answer("answer", "nonsense")
    second = review.next("w", {first.key})
    assert second and second.record["id"] == answerable[2]["id"]
    assert desk.reader.asked == 0
    write_json(tmp_path / "other.csv.config.json", {})
    with pytest.raises(ValueError, match=r"none of the questions of .* is in the dataset"):
        other = [dict(r, id=f"x{r['id']}") for r in answerable]
        result_file(tmp_path / "other.csv", other)
        known = {r["id"]: r for r in RECORDS}
        queue.items_of_results(tmp_path / "other.csv", known, 0.5, Calibration())
    with pytest.raises(ValueError, match="has no test split"):
        sources.get(SPLIT_LABEL.format("test", data))


def test_a_result_file_is_read_with_the_na_prob_that_the_threshold_is_of(tmp_path: Path) -> None:
    """The adapter was calibrated after the file was made."""
    answerable = [r for r in RECORDS if r["answers"]["text"]][:4]
    result_file(tmp_path / "results.csv", answerable)
    known, calibrated = {r["id"]: r for r in answerable}, Calibration(1.0, math.log(30))
    items = queue.items_of_results(tmp_path / "results.csv", known, 0.5, calibrated)
    whys = [item.doubt.why == "the dataset has another answer" for item in items]
    assert whys == [True, False, True, False]  # the third abstains: 0.01 is 0.23 now, 0.4 is 0.95
    assert items[2].said and items[2].said.state == "answer"  # in the file
    data, path = dataset_folder(tmp_path, RECORDS), str(tmp_path / "results.csv")
    desk = make_desk(tmp_path, {}, dataset_name=data, review=path)
    review = Sources(replace(desk, calibration=calibrated)).get(path)
    second = review.next("w", {items[0].key})
    assert second and (second.key, second.doubt) == (items[2].key, items[2].doubt)


def test_files_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    sources = Sources(make_desk(tmp_path, {}))
    paths = []
    for place in "ab":
        (tmp_path / place).mkdir()
        paths.append(tmp_path / place / "questions.json")
        record = {"id": place, "context": "Ann lives here.", "question": f"Who, {place}?"}
        paths[-1].write_text(json.dumps([record | {"answer": "Ann"}]))
    names = [sources.add(str(path)) for path in [*paths, *paths]]
    assert names == ["questions.json", "questions.json (2)"] * 2
    assert names[:2] == sources.names()[:2]
    firsts = [sources.get(name).next("w", set()) for name in names[:2]]
    assert [item.key[0] for item in firsts if item] == ["a", "b"]


def test_it_is_said_where_the_model_answers_otherwise_than_its_result_file() -> None:
    answers = Reading("here", 0, 4, 0.49, -0.1, ())
    silent = Reading(None, None, None, 0.51, -0.1, ())
    wrong = doubt(0.5, 0.5, [], False)
    told = {
        (said, reading.answer): why_here(Item(RECORDS[0], wrong, said), reading)
        for said in (Answer("answer", "here"), Answer("no_answer", "?"), MALFORMED, None)
        for reading in (answers, silent)
    }
    why = "Here because the dataset has another answer."
    assert list(told.values()) == [
        why, f"{why} The result file holds the answer “here”.",
        f"{why} The result file holds no answer.", why,
        f"{why} The result file holds no readable answer.",
        f"{why} The result file holds no readable answer.", why, why,
    ]  # fmt: skip


def test_files_of_ones_own_with_answers_and_without(tmp_path: Path) -> None:
    context = RECORDS[0]["context"]
    path = tmp_path / "own.jsonl"
    rows = [
        {"id": "a", "context": context, "question": "Who?", "answer": context.split()[0]},
        {"id": "b", "context": context, "question": "When?"},
        {"id": "c", "context": context, "question": "Why?", "is_impossible": True},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    records = queue.records_of_file(path)
    assert [r.get("answers", {"text": None})["text"] for r in records] == [
        [context.split()[0]], None, [],
    ]  # fmt: skip
    table = tmp_path / "own.csv"  # a cell of a table is there, and empty
    table.write_text(f'context,question,is_impossible\n"{context}",When?,\n"{context}",Why?,true\n')
    assert [r.get("answers") for r in queue.records_of_file(table)] == [
        None, {"text": [], "answer_start": []},
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    with pytest.raises(ValueError, match=r"own.jsonl, line 4: id 'a' is there twice"):
        queue.records_of_file(path)
    path.write_text(json.dumps({"id": "a", "context": " ", "question": "Who?"}))
    with pytest.raises(ValueError, match=r"own.jsonl, .*: no context, or an empty one"):
        queue.records_of_file(path)


# A window ------------------------------------------------------------------------------------


def test_a_window_judges_undoes_and_says_how_far_it_is(tmp_path: Path) -> None:
    data = dataset_folder(tmp_path, RECORDS[:6])
    desk = make_desk(tmp_path, {RECORDS[4]["id"]: 0.9}, dataset_name=data)
    sources = Sources(desk)
    review, source = Review(desk, sources), SPLIT_LABEL.format("train", data)
    seat = review.next(new_seat(), source)
    with pytest.raises(ValueError, match="Mark the right words first"):
        review.give(seat, "marked", "", "Ada")
    judged = []
    while seat.item is not None:
        judged.append(seat.item.key)
        kind: Any = "marked" if len(judged) == 1 else "right"
        seat = review.give(seat, kind, "  ", " Ada ", marked=[2, 7])
    assert sorted(judged) == sorted((r["id"], r["context"], r["question"]) for r in RECORDS[:6])
    assert review.progress(seat).startswith(
        "6 of 6 judged here, 6 in all · the model is right in 5 of 6"
    )
    found = sources.feedback.read().latest()
    context = found[judged[0]].context
    assert (found[judged[0]].corrected, found[judged[0]].corrected_start) == (context[2:7], 2)
    assert {(v.reviewer, v.note, v.model_digest) for v in found.values()} == {("Ada", "", "d1")}
    abstained = next(v for v in found.values() if v.id == RECORDS[4]["id"])
    assert (abstained.answer, abstained.na_prob) == (None, 0.9)
    assert len(seat.given) == 6
    seat = review.undo(seat)
    assert seat.item is not None and seat.item.key == judged[-1]
    assert len(sources.feedback.read().latest()) == 5
    other = review.next(new_seat(), source)
    assert other.item is None  # it stands in the first window
    for _ in range(5):
        seat = review.undo(seat)
    with pytest.raises(ValueError, match="nothing to undo"):
        review.undo(seat)
    assert sources.feedback.read().latest() == {}


def test_a_verdict_that_cannot_be_written_moves_nothing(tmp_path: Path) -> None:
    data = dataset_folder(tmp_path, RECORDS[:3])
    desk = make_desk(tmp_path, {}, dataset_name=data)
    review = Review(desk, Sources(desk))
    seat = review.next(new_seat(), SPLIT_LABEL.format("train", data))
    (tmp_path / "feedback.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*feedback.jsonl: Is a directory"):
        review.give(seat, "right", "", "Ada")
    assert seat.given == ()


def test_a_verdict_holds_where_the_next_question_cannot_be_shown(tmp_path: Path) -> None:
    data = dataset_folder(tmp_path, RECORDS[:3])
    desk = make_desk(tmp_path, {}, dataset_name=data)
    sources = Sources(desk)
    review = Review(desk, sources)
    first = review.next(new_seat(), SPLIT_LABEL.format("train", data))

    def fail(*_: Any) -> Any:
        raise ValueError("out of memory")

    read, desk.reader.read = desk.reader.read, fail
    seat = review.give(first, "right", "", "Ada")
    assert (len(seat.given), seat.item, seat.fault) == (1, None, "out of memory")
    assert "out of memory" in show(seat)[0]
    desk.reader.read = read
    seat = review.undo(seat)
    assert first.item and seat.item and seat.item.key == first.item.key
    assert (seat.fault, sources.feedback.read().latest()) == ("", {})


def test_what_cannot_be_read_is_left_out_and_told(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    rows = [
        {"id": n, "context": text, "question": "Who?"}
        for n, text in enumerate(["Ann.", "x" * 400_001])
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    desk = make_desk(tmp_path, {}, review=str(path))
    review = Review(desk, Sources(desk))
    seat = review.next(new_seat(), str(path))
    assert seat.item and seat.item.record["id"] == "0"
    assert "1 too long to be read are left out" in review.progress(seat)
    assert review.give(seat, "right", "", "Ada").item is None


def test_what_could_not_be_asked_comes_last_and_is_not_right(tmp_path: Path) -> None:
    data = dataset_folder(tmp_path, RECORDS[:2])
    desk = make_desk(tmp_path, {}, dataset_name=data)
    read = desk.reader.read

    def fail_first(records: Sequence[Mapping[str, Any]]) -> list[Reading]:
        nothing = Reading(None, None, None, None, None, failure="too long for the model")
        return [nothing if record["id"] == RECORDS[0]["id"] else found
                for record, found in zip(records, read(records), strict=True)]  # fmt: skip

    desk.reader.read = fail_first
    review = Review(desk, Sources(desk))
    seat = review.next(new_seat(), SPLIT_LABEL.format("train", data))
    assert seat.item and seat.item.record["id"] == RECORDS[1]["id"]
    seat = review.give(seat, "right", "", "Ada")
    assert seat.item and seat.item.doubt == Doubt(-1, queue.UNASKED)
    with pytest.raises(ValueError, match="no answer that could be right: too long for the model"):
        review.give(seat, "right", "", "Ada")


def test_only_this_model_s_verdicts_say_how_often_it_is_right(tmp_path: Path) -> None:
    data = dataset_folder(tmp_path, RECORDS[:2])
    desk = make_desk(tmp_path, {}, dataset_name=data)
    review, source = Review(desk, Sources(desk)), SPLIT_LABEL.format("train", data)
    seat = review.give(review.next(new_seat(), source), "right", "", "Ada")
    other = Review(replace(desk, answering=Answering("other", "", "d2", None)), review.sources)
    assert "right in" not in other.progress(seat)
    seat = other.give(seat, "wrong", "", "Ada")
    assert "2 of 2 judged here, 2 in all · the model is right in 0 of 1." in other.progress(seat)


@pytest.mark.parametrize(
    ("na_prob", "kind", "right"),
    [
        (0.1, "picked", 1),  # its own span, by the key of its bar
        (0.1, "marked", 1),  # its own words
        (0.1, "unanswerable", 0),
        (0.9, "unanswerable", 1),  # as it says
        (0.9, "picked", 0),
        (0.1, "wrong", 0),
    ],
)
def test_a_model_is_right_where_its_answer_is_the_reviewers(
    na_prob: float, kind: Any, right: int, tmp_path: Path
) -> None:
    data = dataset_folder(tmp_path, RECORDS[:1])
    desk = make_desk(tmp_path, {RECORDS[0]["id"]: na_prob}, dataset_name=data)
    review = Review(desk, Sources(desk))
    seat = review.next(new_seat(), SPLIT_LABEL.format("train", data))
    word = RECORDS[0]["context"].split()[0]
    seat = review.give(seat, kind, "", "Ada", marked=[0, len(word)])
    assert f"the model is right in {right} of 1." in review.progress(seat)


def test_a_question_that_could_not_be_asked_is_not_right(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    nothing: dict[str, Any] = {"answer": None, "corrected": None, "corrected_start": None}
    texts = {name: RECORDS[0][name] for name in ("id", "title", "context", "question")}
    said = verdicts.Verdict(verdict="unanswerable", na_prob=None, **nothing, **texts)
    verdicts.append(path, [said])
    assert not verdicts.load(path).verdicts[0].agrees


def test_nothing_to_review_says_what_to_do(tmp_path: Path) -> None:
    desk = make_desk(tmp_path, {}, dataset_name=str(tmp_path / "none"))
    sources = Sources(desk)
    assert sources.names() == []
    with pytest.raises(ValueError, match="upload a file of questions"):
        Review(desk, sources).next(new_seat(), "")
