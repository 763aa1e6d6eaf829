"""The verdicts: kept through kills and several writers, exported, taken in, merged into a dataset."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import make_records

import create_squad_dataset
from llama_squad.answers import Answer
from llama_squad.data import load_squad, read_files
from llama_squad.feedback import __main__ as shell
from llama_squad.feedback import exchange, verdicts
from llama_squad.feedback.verdicts import FeedbackFile, Verdict
from llama_squad.results import ResultsFile
from llama_squad.rows import make_row
from llama_squad.sources.cleaning import Cleaner

CONTEXT = "The mill opened in 1912. It closed in 1954, “for good”."


def judged(question: str = "When did it open?", **changes: Any) -> Verdict:
    values: dict[str, Any] = {"id": question, "title": "Mill", "context": CONTEXT, "question": question,
              "verdict": "marked", "answer": "1954", "na_prob": 0.25, "corrected": "1912",
              "corrected_start": 19, "golds": None, "reviewer": "Ada", "model": "tiny"}  # fmt: skip
    return Verdict(**values | changes)


# The file ------------------------------------------------------------------------------------

WRITER = """
import sys
from llama_squad.feedback.verdicts import Verdict, append
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
for n in range(count):
    v = Verdict(id=f"{name}-{n}", title="t", context="x" * 5000, question="q", verdict="wrong",
                reviewer=name)
    append(path, [v])
    print(v.id, flush=True)
"""


def start_writer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, str(count)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_processes_write_two_hundred_verdicts_at_once(tmp_path: Path) -> None:
    path = tmp_path / "data" / "feedback.jsonl"
    writers = [start_writer(path, name, 100) for name in ("one", "two")]
    said = [writer.communicate(timeout=60)[0].split() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    found = verdicts.load(path)
    assert len(found.verdicts) == 200
    assert found.torn == 0
    for name, ids in zip(("one", "two"), said, strict=True):
        assert [v.id for v in found.verdicts if v.reviewer == name] == ids
    order = [v.reviewer for v in found.verdicts]
    assert order != sorted(order), "they did not write at once"


def test_twenty_kills_while_writing_lose_nothing(tmp_path: Path) -> None:
    path, rng = tmp_path / "feedback.jsonl", random.Random(0)
    said: list[str] = []
    for kill in range(20):
        writer = start_writer(path, f"run{kill}", 100_000)
        assert writer.stdout is not None
        said.append(writer.stdout.readline().strip())  # it is in the midst of it
        time.sleep(rng.random() * 0.1)
        os.kill(writer.pid, signal.SIGKILL)
        said += writer.stdout.read().split()
        writer.wait(10)
    found = {v.id for v in verdicts.load(path).verdicts}
    assert len(said) > 30
    assert not set(said) - found


@pytest.mark.parametrize("kept", [1, 30, -1])
def test_a_torn_line_is_put_aside_and_told(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "feedback.jsonl"
    verdicts.append(path, [judged("q1"), judged("q2")])
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:kept])
    found = verdicts.load(path)
    assert [v.id for v in found.verdicts] == ["q1"]
    assert found.torn == len(second[:kept])
    assert "half-written" in shell.describe(found, str(path))
    verdicts.append(path, [judged("q3")])
    assert [v.id for v in verdicts.load(path).verdicts] == ["q1", "q3"]
    assert verdicts.torn_path(path).read_bytes() == second[:kept] + b"\n"


def test_a_full_disk_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "feedback.jsonl"
    verdicts.append(path, [judged("q1")])
    before = path.read_bytes()

    def fill(fd: int, parts: Sequence[bytes]) -> None:
        os.write(fd, b"".join(parts)[:40])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(verdicts, "write_durably", fill)
    with pytest.raises(ValueError, match="No space left on device; make room"):
        verdicts.append(path, [judged("q2")])
    assert path.read_bytes() == before


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    odd = judged("Who said \u2028 “</s>”,\r\n \ud83d?", note="a\nb", corrected="“for good”",
                 corrected_start=44, golds={"text": ["1912"], "answer_start": [19]})  # fmt: skip
    file = FeedbackFile(path)
    assert file.read().verdicts == ()
    verdicts.append(path, [odd])
    (again,) = file.read().verdicts
    assert again == odd
    assert file.read() is file.read()
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(ValueError, match=r"feedback.jsonl, line 2, is no verdict"):
        file.read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corrected_start": 18}, "does not stand at character 18"),
        ({"corrected_start": None}, "does not stand at character None"),
        ({"corrected": " ", "corrected_start": 3}, "the answer is empty"),
        ({"verdict": "perhaps"}, "verdict is 'perhaps'"),
        ({"question": None}, "must be texts"),
    ],
)
def test_verdicts_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judged(**changes)


def test_the_latest_wins_conflicts_are_counted_and_undone_is_undone(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    agreed = [judged("q1"), judged("q1", reviewer="Bo")]
    differ = [judged("q2"), judged("q2", verdict="unanswerable", corrected=None, reviewer="Bo")]
    verdicts.append(path, [*agreed, *differ, judged("q2", verdict="skipped"), judged("q3")])
    found = verdicts.load(path)
    assert found.counts() == {"marked": 2, "unanswerable": 1}
    assert found.agreement() == (2, 1)
    assert "1 conflicts" in shell.describe(found, str(path))
    verdicts.undo(path, differ[1])
    found = verdicts.load(path)
    assert found.counts() == {"marked": 3}
    assert found.agreement() == (1, 1)
    assert len(path.read_text().splitlines()) == 7


# Out and in ----------------------------------------------------------------------------------


def test_export_is_squad_json_that_create_takes(tmp_path: Path) -> None:
    path, out = tmp_path / "feedback.jsonl", tmp_path / "out.json"
    golds = {"text": ["in 1912", "1912"], "answer_start": [16, 19]}
    verdicts.append(path, [
        judged("q1", golds=golds),
        judged("q2", verdict="unanswerable", corrected=None, golds=golds, note="it is not said"),
        judged("q3", verdict="wrong", corrected=None),
        judged("q4", id="q1"),
    ])  # fmt: skip
    shell.main(["--feedback", str(path), "--export", str(out)])
    records = read_files([str(out)])
    assert [(r["id"], r["question"], r["answers"]["text"]) for r in records] == [
        ("q1", "q1", ["1912", "in 1912"]), ("q2", "q2", []), ("q1-2", "q4", ["1912"]),
    ]  # fmt: skip
    assert json.loads(out.read_text())["version"] == "v2.0"
    beside = json.loads((tmp_path / "out.provenance.json").read_text())
    assert [a["exported_id"] for a in beside["answers"]] == ["q1", "q2", "q1-2"]
    assert beside["answers"][1]["note"] == "it is not said"
    assert [v["id"] for v in beside["left_out"]] == ["q3"]


def test_import_of_a_file_labelled_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, theirs = tmp_path / "feedback.jsonl", tmp_path / "theirs.jsonl"
    rows = [
        {"id": "1", "context": CONTEXT, "question": "When did it close?", "answer": "1954"},
        {"id": "2", "context": CONTEXT, "question": "Who owned it?", "answer": ""},
    ]
    theirs.write_text("\n".join(map(json.dumps, rows)))
    command = ["--feedback", str(path), "--import", str(theirs), "--reviewer", "Bo"]
    shell.main(command)
    assert "2 questions taken in, 0 were there" in capsys.readouterr().out
    shell.main(command)
    assert "0 questions taken in, 2 were there" in capsys.readouterr().out
    found = verdicts.load(path).verdicts
    assert [(v.verdict, v.corrected, v.corrected_start, v.reviewer) for v in found] == [
        ("marked", "1954", 38, "Bo"), ("unanswerable", None, None, "Bo"),
    ]  # fmt: skip


def test_import_of_anothers_verdicts_takes_them_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, theirs = tmp_path / "feedback.jsonl", tmp_path / "theirs.jsonl"
    said = [judged("q1", reviewer="Bo"), judged("q2", verdict="wrong", corrected=None)]
    verdicts.append(path, [judged("q0")])
    verdicts.append(theirs, said)
    command = ["--feedback", str(path), "--import", str(theirs)]
    shell.main(command)
    shell.main(command)
    assert "0 questions taken in, 2 were there" in capsys.readouterr().out
    assert verdicts.load(path).verdicts[1:] == tuple(said)
    verdicts.undo(theirs, said[0])
    verdicts.undo(path, said[1])
    shell.main(command)  # an undo is one of theirs, too; and what is undone here stays so
    assert [v.question for v in verdicts.load(path).verdicts] == ["q0"]
    with theirs.open("a") as file:
        file.write("{")
    with pytest.raises(SystemExit, match=r"theirs.jsonl: the last line is cut off"):
        shell.main(command)
    theirs.write_text(theirs.read_text()[:-1].replace('"wrong"', '"perhaps"'))
    with pytest.raises(SystemExit, match=r"theirs.jsonl, line 2, is no verdict"):
        shell.main(command)


def test_the_latest_counts_whenever_it_was_imported(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    late = judged("q1", time="2026-11-30T10:00:00.000+00:00")
    early = judged("q1", verdict="wrong", corrected=None, time="2025-11-30T10:00:00.000+00:00")
    verdicts.append(path, [late, early])
    assert list(verdicts.load(path).latest().values()) == [late]


def test_own_questions_may_have_a_column_of_that_name(tmp_path: Path) -> None:
    path, own = tmp_path / "feedback.jsonl", tmp_path / "own.jsonl"
    row = {"id": "1", "title": "T", "context": CONTEXT, "question": "When?", "answer": "1912"}
    own.write_text(json.dumps(row | {"verdict": "right"}) + "\n")
    shell.main(["--feedback", str(path), "--import", str(own)])
    (found,) = verdicts.load(path).verdicts
    assert (found.verdict, found.corrected) == ("marked", "1912")


@pytest.mark.parametrize("name", ["./feedback.jsonl", "feedback.provenance.json"])
def test_an_export_does_not_write_over_the_verdicts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    verdicts.append("feedback.jsonl", [judged("q1")])
    Path("feedback.provenance.json").symlink_to("feedback.jsonl")
    with pytest.raises(SystemExit, match="which is read: name another file"):
        shell.main(["--feedback", "feedback.jsonl", "--export", name.replace(".provenance", "")])
    assert len(verdicts.load("feedback.jsonl").verdicts) == 1


def test_nothing_to_export_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is nothing to export"):
        shell.main(["--feedback", str(tmp_path / "none.jsonl"), "--export", str(tmp_path / "x")])


# What came of it -----------------------------------------------------------------------------


def answered(path: Path, replies: dict[str, str]) -> None:
    """Write a result file: question → reply; the dataset's answer to each is 1954."""
    golds = {"text": ["1954"], "answer_start": [38]}
    with ResultsFile(path, {}) as file:
        file.append([
            make_row({"id": q, "title": "Mill", "question": q, "answers": golds}, "",
                     Answer("no_answer" if text == "?" else "answer", text), "")
            for q, text in replies.items()
        ])  # fmt: skip


def test_what_came_of_it_tells_reviewed_questions_from_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "feedback.jsonl"
    verdicts.append(path, [judged("q1"), judged("q2", verdict="unanswerable", corrected=None),
                           judged("q3", verdict="wrong", corrected=None), judged("gone")])  # fmt: skip
    before, after = tmp_path / "before.csv", tmp_path / "after.csv"
    answered(before, {"q1": "1954", "q2": "1954", "q3": "?", "q4": "1954", "q5": "1954", "q6": "?"})
    answered(after, {"q5": "in 1954", "q4": "?", "q3": "1954", "q2": "1954", "q1": "1912"})
    # q1 by the reviewer's answer, 1912; q2 by hers, that there is none; q6 is not in both
    compared = ["--feedback", str(path), "--before", str(before), "--after", str(after)]
    shell.main(compared)
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "Of 2 reviewed questions 0 were right before, and 1 are after."
    assert said[2].startswith("3 other questions:")
    # exact 0 1 1 → 1 0 0; F1 0 1 1 → 1 0 2/3; s of (1, -1, -1) is 1.1547, of (1, -1, -1/3) 1.0184
    assert said[3].split() == ["exact", "66.67", "33.33", "-33.33", "±", "130.66"]
    assert said[4].split() == ["F1", "66.67", "55.56", "-11.11", "±", "115.24"]
    assert said[5] == "  1 became right (exact), 2 wrong."
    answered(tmp_path / "other.csv", {"q7": "?"})
    with pytest.raises(SystemExit, match=r"other.csv share no question: evaluate the same split"):
        shell.main([*compared[:-1], str(tmp_path / "other.csv")])
    with pytest.raises(SystemExit):
        shell.main(compared[:-2])
    assert "--before and --after go together" in capsys.readouterr().err


# A dataset with feedback ---------------------------------------------------------------------


def verdict_on(record: dict[str, Any], **changes: Any) -> Verdict:
    same = {key: record[key] for key in ("id", "title", "context", "question")}
    word = record["context"].split()[0]
    values = {"verdict": "marked", "corrected": word, "corrected_start": 0,
              "golds": record["answers"]}  # fmt: skip
    return Verdict(**same | values | changes)


def test_verdicts_are_merged_into_the_train_split() -> None:
    train, test = make_records(4, [3], seed=1), make_records(2, [3], seed=2)
    right, wrong = train[1], test[2]
    feedback = verdicts.Feedback((
        verdict_on(right, verdict="right", corrected=right["answers"]["text"][0],
                   corrected_start=right["answers"]["answer_start"][0]),
        verdict_on(test[1], verdict="wrong", corrected=None, corrected_start=None),
        verdict_on(wrong, verdict="unanswerable", corrected=None, corrected_start=None),
        verdict_on(wrong),
        judged("new"),
        verdict_on(train[5], question="Another question of that id?"),
    ))  # fmt: skip
    cleaner = Cleaner()
    merged = exchange.merge({"train": train, "test": test}, feedback, "f.jsonl", cleaner)
    assert [r["id"] for r in merged["train"][:4]] == [right["id"], wrong["id"], "new", "1-1-2-2"]
    assert merged["train"][0] == right
    assert merged["train"][1]["answers"]["text"][0] == wrong["context"].split()[0]
    assert wrong["id"] not in {r["id"] for r in merged["test"]}
    assert sum(map(len, merged.values())) == len(train) + len(test) + 2
    assert cleaner.changed == {
        exchange.CONFIRMED: 1, exchange.CHANGED: 1, exchange.ADDED: 2, exchange.ID_NUMBERED: 1,
    }  # fmt: skip
    few = exchange.merge(
        {"train": make_records(90, [3])}, feedback, "f.jsonl", Cleaner(), replay=2.0
    )
    assert len(few["train"]) == 4 + 102  # whole paragraphs that hold 100 at least


def test_create_with_feedback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = make_records(6, [3], seed=1)
    rows = "\n".join(json.dumps(record) for record in train)
    (tmp_path / "train.jsonl").write_text(rows)
    path = tmp_path / "feedback.jsonl"
    flags = ["--train_files", str(tmp_path / "train.jsonl"), "--dataset_name",
             str(tmp_path / "data"), "--validation_ratio", "0", "--feedback", str(path)]  # fmt: skip
    with pytest.raises(SystemExit, match="--feedback: no file .*feedback.jsonl here"):
        create_squad_dataset.main(flags)
    path.touch()
    with pytest.raises(SystemExit, match="holds no verdict that says"):
        create_squad_dataset.main(flags)
    with pytest.raises(SystemExit, match="--replay must be at least 0, not inf"):
        create_squad_dataset.main([*flags, "--replay", "inf"])
    verdicts.append(path, [verdict_on(train[4])])
    create_squad_dataset.main(flags)
    assert exchange.CHANGED in capsys.readouterr().out
    rows = load_squad(str(tmp_path / "data"))["train"]
    row = next(r for r in rows if r["id"] == train[4]["id"])
    assert row["messages"][-1]["content"].count(train[4]["context"].split()[0]) == 1
    with pytest.raises(SystemExit, match="--replay needs --feedback"):
        create_squad_dataset.main([*flags[:-2], "--replay", "4"])
