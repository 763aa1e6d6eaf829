"""The result file: what it survives, when it refuses, and the figures that come out of it."""

import csv
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llama_squad.answers import FAILED, MALFORMED_PREDICTION, Answer, extract_answer, format_answer
from llama_squad.durable import check_writable
from llama_squad.result_reader import read_results
from llama_squad.results import ResultsFile, config_path
from llama_squad.rows import COLUMNS, SEED_COLUMNS, Row, make_row, rethreshold
from llama_squad.summary import summarize, write_official

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"model_name": "tiny", "num_beams": 10, "train": {"lr": 1e-6}, "batch_size": 8}
NASTY = [
    'quotes " and ""',
    "lines\nof\r\nthree kinds\rhere",
    "NUL \x00 and \x1a",
    "\u2028\u2029\x85\x0b\x0c\x1c",
    "commas, semicolons; tabs\t",
    "Beyoncé 日本語 🦙",
    "x" * 300_000,
    "",
    "'",
    "\ufeffBOM",
    "\\",
]


def row(id_: str = "q1", reply: str = "x", golds: tuple[str, ...] = ("x",), **more: Any) -> Row:
    record = {"id": id_, "title": "T", "question": "Q?", "answers": {"text": list(golds)}}
    completion = format_answer(reply) if reply else "I do not know."
    return make_row(record, completion, extract_answer(completion), "prompt", **more)


def failed(id_: str, golds: tuple[str, ...] = ("x",)) -> Row:
    """Make the row of a question that was refused."""
    return row(id_, "", golds) | {
        "completion": "400: too long", "Full response": "400: too long", "state": FAILED.state
    }  # fmt: skip


def write(path: Path, rows: list[Row], **settings: Any) -> None:
    with ResultsFile(path, SETTINGS | settings) as file:
        file.append(rows)


def test_make_row() -> None:
    assert row("q", "Beyoncé", ("Beyoncé", "B"), na_prob=0.25, score=-1.5) == {
        "id": "q",
        "title": "T",
        "question": "Q?",
        "answers": ["Beyoncé", "B"],
        "prediction_text": "Beyoncé",
        "state": "answer",
        "completion": '```json\n{\n  "answer": "Beyoncé"\n}\n```',
        "na_prob": 0.25,
        "score": -1.5,
        "best_span": None,
        "best_span_log_prob": None,
        "no_answer_log_prob": None,
        "n_best": None,
        "Prompt": "prompt",
        "Correct answers": '["Beyoncé", "B"]',
        "Model answer": "Beyoncé",
        "Full response": '```json\n{\n  "answer": "Beyoncé"\n}\n```',
        "Exact match": True,
    }
    abstained = row("q", "?", ())
    assert abstained["Correct answers"] == '["?"]'
    assert (abstained["Model answer"], abstained["Exact match"]) == ("?", True)
    malformed = row("q", "", ())
    assert (malformed["Model answer"], malformed["Exact match"]) == ("", False)
    assert (malformed["state"], malformed["na_prob"]) == ("malformed", None)


def test_any_text_survives(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "results.csv"
    rows = []
    for number, text in enumerate(NASTY):
        record = {"id": f"q{number}", "title": text, "question": text, "answers": {"text": [text]}}
        rows.append(make_row(record, text, Answer("answer", text), text, 1e-300, score=-0.1))
    write(path, rows)
    assert read_results(path) == rows
    with path.open(newline="", encoding="utf-8") as file:
        csv.field_size_limit(10**6)
        assert next(csv.reader(file)) == list(COLUMNS)
    with ResultsFile(path, SETTINGS) as again:
        assert again.done == {f"q{number}" for number in range(len(NASTY))}


def test_a_lone_surrogate_is_written_as_its_escape(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    write(path, [row() | {"completion": "a\ud800b"}])
    assert read_results(path)[0]["completion"] == "a\\ud800b"


def test_resume(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    write(path, [row("a"), row("b", "?", (), na_prob=0.75)])
    assert json.loads(config_path(path).read_text()) == SETTINGS
    assert config_path(path).name == "results.csv.config.json"
    with ResultsFile(path, SETTINGS) as file:
        assert file.done == {"a", "b"}
        file.append([row("c")])
        assert file.done == {"a", "b", "c"}
        with pytest.raises(ValueError, match="already has a row for question a"):
            file.append([row("a")])
        with pytest.raises(ValueError, match="already has a row for question d"):
            file.append([row("d"), row("d")])
    assert [r["id"] for r in read_results(path)] == ["a", "b", "c"]
    assert [r["na_prob"] for r in read_results(path)] == [None, 0.75, None]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    write(path, [row("a")])
    before = path.read_bytes()
    other = SETTINGS | {"num_beams": 1, "train": {"lr": 2e-7}, "seed": 1, "batch_size": 4}
    with pytest.raises(ValueError, match=r"results\.csv was made with other settings") as error:
        ResultsFile(path, other, volatile=["batch_size"]).__enter__()
    message = str(error.value)
    assert "num_beams: 10 in the file, 1 now" in message
    assert "train.lr: 1e-06 in the file, 2e-07 now" in message
    assert "seed: '(absent)' in the file, 1 now" in message
    assert "batch_size" not in message
    assert "--output" in message and "--overwrite" in message
    assert path.read_bytes() == before
    with ResultsFile(path, SETTINGS | {"batch_size": 4}, volatile=["batch_size"]) as file:
        assert file.done == {"a"}
    with ResultsFile(path, other, overwrite=True) as file:
        assert file.done == set()
    assert json.loads(config_path(path).read_text()) == other


def test_settings_that_json_writes_otherwise_still_match(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    settings = {"modules": ("a", "b"), "folder": Path("x")}
    for done in (set(), {"a"}):
        with ResultsFile(path, settings) as file:
            assert file.done == done
            if not done:
                file.append([row("a")])


def test_a_file_without_settings_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    write(path, [row("a")])
    config_path(path).unlink()
    with pytest.raises(ValueError, match=r"settings cannot be read .*--overwrite"):
        ResultsFile(path, SETTINGS).__enter__()
    other = tmp_path / "precious.csv"
    other.write_text("name,salary\nme,0\n")
    with pytest.raises(ValueError, match="no result file of this program"):
        ResultsFile(other, SETTINGS).__enter__()
    assert other.read_text() == "name,salary\nme,0\n"
    assert not config_path(other).exists()


def test_two_processes_cannot_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    with ResultsFile(path, SETTINGS) as file:
        file.append([row("a")])
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="another process is writing"):
                ResultsFile(path, SETTINGS, overwrite=overwrite).__enter__()
    assert [r["id"] for r in read_results(path)] == ["a"]


def test_every_torn_end_is_cut_to_whole_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file cut at any byte resumes with its whole rows, and ends equal to an undisturbed one."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a thousand files: the disk is not the point
    path = tmp_path / "results.csv"
    rows = [row("a"), row("b", 'é "x"\n🦙\r\n, "'), row("c", "?", ())]
    ends = []
    for number in range(3):
        write(path, [rows[number]])
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        with ResultsFile(path, SETTINGS) as file:
            assert len(file.done) == sum(end <= length for end in ends)
            file.append([r for r in rows if r["id"] not in file.done])
        assert path.read_bytes() == whole


def test_reading_leaves_out_a_torn_row(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    write(path, [row("a"), row("b")])
    path.write_bytes(path.read_bytes()[:-30])
    assert [r["id"] for r in read_results(path)] == ["a"]


WRITER = """
import sys
from llama_squad.answers import extract_answer
from llama_squad.results import ResultsFile
from llama_squad.rows import make_row

ids = [str(number) for number in range(400)]
with ResultsFile(sys.argv[1], {"seed": 1}) as file:
    print("ready", flush=True)
    todo = [id_ for id_ in ids if id_ not in file.done]
    for start in range(0, len(todo), 4):
        rows = []
        for id_ in todo[start : start + 4]:
            completion = 'Réply "' + id_ + '"\\n' + '{"answer": "' + id_ * 500 + '"}'
            record = {"id": id_, "title": "", "question": "", "answers": {"text": [id_]}}
            rows.append(make_row(record, completion, extract_answer(completion), "p\\r" * 99))
        file.append(rows)
"""


@pytest.mark.slow
def test_kill_minus_9_at_ten_moments_loses_and_doubles_nothing(tmp_path: Path) -> None:
    undisturbed, path = tmp_path / "undisturbed.csv", tmp_path / "results.csv"
    command = [sys.executable, "-c", WRITER]
    subprocess.run([*command, undisturbed], cwd=ROOT, check=True, capture_output=True)
    rng, kept = random.Random(0), [0]
    for _ in range(10):
        with subprocess.Popen([*command, path], cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.001, 0.02))
            os.kill(process.pid, signal.SIGKILL)
        torn = path.read_bytes() + b'"torn","\xc3' * rng.randint(0, 1)
        path.write_bytes(torn)
        kept.append(len(path.read_bytes()))
    subprocess.run([*command, path], cwd=ROOT, check=True, capture_output=True)
    assert kept[-1] > kept[1] > 0, "the kills came before anything was written"
    assert path.read_bytes() == undisturbed.read_bytes()
    assert len(read_results(path)) == 400


def test_seed_file_with_python_lists_and_json(tmp_path: Path) -> None:
    path = tmp_path / "original.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(SEED_COLUMNS)
        writer.writerow(
            ["[INST] a", "['in France', \"d'Or\"]", "d'Or", '{"answer": "d\'Or"}', "True"]
        )
        writer.writerow(["[INST] b", '["?"]', "?", '{"answer": "?"}', "True"])
        writer.writerow(["[INST] c", "['?']", "", "no idea\nat all", "False"])
        writer.writerow(["[INST] d", '["x"]', "?", '{"answer": "?"}', "False"])
    rows = read_results(path)
    assert [r["id"] for r in rows] == ["1", "2", "3", "4"]
    assert [r["answers"] for r in rows] == [["in France", "d'Or"], [], [], ["x"]]
    assert [r["state"] for r in rows] == ["answer", "no_answer", "malformed", "no_answer"]
    assert [r["Exact match"] for r in rows] == [True, True, False, False]
    assert rows[2]["completion"] == "no idea\nat all"
    assert rows[0]["Prompt"] == "[INST] a"
    figures = summarize(rows)
    assert figures["% Valid JSON"] == 75.0
    assert figures["% Exact Match"] == 50.0
    assert figures["% EM for Valid JSON"] == pytest.approx(200 / 3)
    assert figures["% Correct No Answer"] == 50.0
    assert figures["% Correct Has Answer"] == 50.0
    assert "best_exact" not in figures


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"name,salary\nme,0\n", "it has no column id, title"),
        (b"\xff\xfe\x00", "damaged or no result file: 'utf-8'"),
        (b"PK\x03\x04\x14\x00", "it has no column"),
        (b'Prompt,Correct answers,Model answer,Full response,Exact match\n"a', "damaged"),
        (b"Prompt,Correct answers,Model answer,Full response,Exact match\na,b\n", "2 cells"),
        (
            b"Prompt,Correct answers,Model answer,Full response,Exact match\na,[x],c,d,e\n",
            "row 1: ",
        ),
        (
            b'Prompt,Correct answers,Model answer,Full response,Exact match\na,"{""a"":1}",c,d,e\n',
            "not a list of strings",
        ),
        (b"Prompt,Correct answers,Model answer,Full response,Exact match\n", "holds no results"),
        (
            b"Prompt,Correct answers,Model answer,Full response,Exact match,note\na,[],c,d,e,f\n",
            "no result file: nobody knows its column 'note'",
        ),
        (b"Prompt,Prompt,Model answer\n", "it has the column 'Prompt' twice"),
        (",".join([*COLUMNS, "rank"]).encode() + b"\n", "nobody knows its column 'rank'"),
        (
            ",".join(c for c in COLUMNS if c != "question").encode() + b"\n",
            "no result file: it has no column question$",
        ),
        (
            ",".join("qestion" if c == "question" else c for c in COLUMNS).encode() + b"\n",
            "it has no column question; nobody knows its column 'qestion'",
        ),
    ],
)
def test_a_file_that_is_not_ours(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_results(path)
    assert "results.csv" in str(error.value)


def test_reading_errors_of_our_own_file(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    with pytest.raises(ValueError, match=r"cannot read .*results\.csv.*test_llama_squad"):
        read_results(path)
    with pytest.raises(ValueError, match="cannot read"):
        read_results(tmp_path)
    write(path, [row("a")])
    whole = path.read_text()
    path.write_text(whole + whole.partition("\n")[2])
    with pytest.raises(ValueError, match="row 2: question a is there twice"):
        read_results(path)
    path.write_text(whole.replace('"answer",', '"maybe",'))
    with pytest.raises(ValueError, match="row 1: state is 'maybe'"):
        read_results(path)


def test_gather(tmp_path: Path) -> None:
    shards = [tmp_path / f"results.{rank}.csv" for rank in range(2)]
    write(shards[0], [row("c"), row("a", "é\n")])
    write(shards[1], [row("d"), row("b"), row("a", "other")])
    path = tmp_path / "results.csv"
    with ResultsFile(path, SETTINGS) as file:
        file.gather(shards, ["a", "b", "c", "d", "e"])
        assert file.done == {"a", "b", "c", "d"}
        assert [r["id"] for r in read_results(path)] == ["a", "b", "c", "d"]
        assert read_results(path)[0]["prediction_text"] == "é\n"
        with pytest.raises(ValueError, match="one row for each of 5 .* 4 rows for 4 .look at e"):
            file.check_complete(["a", "b", "c", "d", "e"])
        file.append([row("e")])
        file.check_complete(["a", "b", "c", "d", "e"])
    single = tmp_path / "single.csv"
    write(single, [row("a", "é\n"), row("b"), row("c"), row("d"), row("e")])
    assert path.read_bytes() == single.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    with (
        ResultsFile(path, SETTINGS) as file,
        pytest.raises(ValueError, match=r"2 rows of .*not of this dataset \(the first: d\)"),
    ):
        file.gather(shards, ["a", "b", "c"])
    assert path.read_bytes() == single.read_bytes()


def test_a_failed_row_stays_until_a_reply_takes_its_place(tmp_path: Path) -> None:
    path, shard = tmp_path / "results.csv", tmp_path / "shard"
    with ResultsFile(path, SETTINGS) as file:
        file.append([row("a"), failed("b"), row("c"), failed("d")])
        assert (file.done, file.failed) == ({"a", "c"}, {"b", "d"})
        with pytest.raises(ValueError, match="already has a row for question b"):
            file.append([row("b")])
    write(shard, [row("b"), failed("d")])
    with ResultsFile(path, SETTINGS) as file:
        assert (file.done, file.failed) == ({"a", "c"}, {"b", "d"})
        file.gather([shard], ["a", "b", "c", "d"])
        assert (file.done, file.failed) == ({"a", "b", "c"}, {"d"})
        file.check_complete(["a", "b", "c", "d"])
    assert read_results(path) == [row("a"), row("b"), row("c"), failed("d")]


def test_the_lock_stays_where_a_file_takes_the_place_of_another(tmp_path: Path) -> None:
    path, shard = tmp_path / "results.csv", tmp_path / "shard"
    write(shard, [row("b")])
    with ResultsFile(path, SETTINGS) as file:
        file.append([row("a")])
        before = path.stat().st_ino
        file.gather([shard], ["b", "a"])
        assert path.stat().st_ino != before
        with pytest.raises(ValueError, match="another process is writing"):
            ResultsFile(path, SETTINGS).__enter__()
        file.append([row("c")])
    assert [r["id"] for r in read_results(path)] == ["b", "a", "c"]


def test_files_that_differ_behind_a_dot_share_nothing(tmp_path: Path) -> None:
    for name in ("v1.0", "v1.1"):
        with ResultsFile(tmp_path / name, {"name": name}) as file:
            file.append([row(name)])
    for name in ("v1.0", "v1.1"):
        with ResultsFile(tmp_path / name, {"name": name}) as file:
            assert file.done == {name}


LIMITED = """
import resource, sys
from llama_squad.answers import extract_answer
from llama_squad.durable import check_writable
from llama_squad.results import ResultsFile
from llama_squad.rows import make_row

record = {"id": "", "title": "", "question": "", "answers": {"text": []}}
row = make_row(record, "x" * 500, extract_answer("x"), "p")
with ResultsFile(sys.argv[1], {}) as file:
    file.append([row | {"id": "a"}])
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
    try:
        file.append([row | {"id": "b"}])
    except ValueError as error:
        print(error)
try:
    check_writable(sys.argv[1])
except ValueError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_and_loses_no_whole_row(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    command = [sys.executable, "-c", LIMITED, str(path)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    line = f"cannot write {path}: File too large; make room, and the same command goes on"
    assert [said.startswith(line) for said in done.stdout.splitlines()] == [True, True]
    assert path.stat().st_size == 1500
    with ResultsFile(path, {}) as file:
        assert file.done == {"a"}
        file.append([row("b")])
    assert [r["id"] for r in read_results(path)] == ["a", "b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.csv", "results.csv.config.json"]


def test_a_full_disk_while_files_are_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, shard = tmp_path / "results.csv", tmp_path / "shard"
    write(path, [row("b")])
    write(shard, [row("a")])
    before = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with ResultsFile(path, SETTINGS) as file:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match=r"results\.csv: No space left on device; make room"):
            file.gather([shard], ["a", "b"])
        monkeypatch.undo()
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == before


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path, reason in [
        (tmp_path / "folder", "it is no regular file; choose another place"),
        (tmp_path / "file" / "results.csv", "(Not a directory|File exists); choose another place"),
    ]:
        with pytest.raises(ValueError, match=f"^cannot write {path}: {reason}"):
            check_writable(path)
        with pytest.raises(ValueError, match=f"^cannot write {path}: .*another place"):
            ResultsFile(path, SETTINGS).__enter__()
    write(tmp_path / "results.csv", [row("a")])
    before = sorted(tmp_path.iterdir())
    check_writable(tmp_path / "results.csv")
    check_writable(tmp_path / "new" / "results.csv")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "new"])
    assert read_results(tmp_path / "results.csv") == [row("a")]
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anything
    with pytest.raises(ValueError, match=r"cannot write .*results\.csv: Permission denied"):
        check_writable(tmp_path / "results.csv")


def span_row(id_: str, text: str, golds: tuple[str, ...], margin: float, threshold: float) -> Row:
    """Make the row of a best span whose log-probability is ``margin`` above that of "?"."""
    na_prob = 1 / (1 + math.exp(margin))
    given = "?" if na_prob > threshold else text
    return row(
        id_, given, golds, na_prob=na_prob, score=-5.0 if given == "?" else margin - 5.0, best_span=text,
        best_span_log_prob=margin - 5.0, no_answer_log_prob=-5.0,
    )  # fmt: skip


def span_rows(threshold: float) -> list[Row]:
    return [
        span_row("a", "x", ("x",), 2.0, threshold),
        span_row("b", "y", ("x",), 1.0, threshold),
        span_row("c", "z", (), -1.0, threshold),
        span_row("d", "x", ("x",), -2.0, threshold),
    ]


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_another_threshold_and_best_exact_whatever_the_threshold(
    tmp_path: Path, threshold: float
) -> None:
    path = tmp_path / "results.csv"
    write(path, span_rows(threshold))
    rows = read_results(path)
    for other in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert [rethreshold(r, other) for r in rows] == span_rows(other)
    figures = summarize(rows)
    # a is right from 0.12 on, c (without an answer) up to 0.73, d from 0.88 on.
    assert (figures["best_exact"], figures["best_f1"]) == (50.0, 50.0)
    assert figures["best_exact_thresh"] == pytest.approx(1 / (1 + math.exp(2)))
    # Of a, b and d, which have an answer, b's span is wrong; c is less likely to have one than two.
    told = (figures["HasAns_span_exact"], figures["HasAns_span_f1"], figures["na_prob_auroc"])
    assert told == pytest.approx((200 / 3,) * 3)
    apart = [abs(row["na_prob"] - (not row["answers"])) for row in rows]  # each in a bin of its own
    assert figures["na_prob_ece"] == pytest.approx(25 * sum(apart))


def test_a_failed_question_is_wrong_at_every_threshold(tmp_path: Path) -> None:
    rows = [*span_rows(0.5), failed("e", ())]
    figures = summarize(rows)
    assert figures["states"]["failed"] == 1
    assert (figures["% Valid JSON"], figures["NoAns_exact"]) == (80.0, 50.0)
    assert figures["best_exact"] == 40.0
    assert figures["na_prob_auroc"] == pytest.approx(100 * 2 / 6)
    assert rethreshold(rows[4], 0.0) == rows[4]
    write_official(rows, tmp_path)
    assert json.loads((tmp_path / "predictions.json").read_text())["e"] == MALFORMED_PREDICTION
    assert json.loads((tmp_path / "na_prob.json").read_text())["e"] == 0.0


def test_a_file_from_before_rows_kept_their_best_span(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    write(path, [row("a", na_prob=0.25), row("b", "?", (), na_prob=0.75)])
    with path.open(newline="", encoding="utf-8") as file:
        older = [{k: v for k, v in r.items() if k not in NEW} for r in csv.DictReader(file)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, older[0], quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writeheader()
        writer.writerows(older)
    rows = read_results(path)
    assert rows == [row("a", na_prob=0.25), row("b", "?", (), na_prob=0.75)]
    assert "best_exact" not in summarize(rows)
    assert rethreshold(rows[0], 0.2)["state"] == "no_answer"
    with pytest.raises(ValueError, match="question b abstains, and this older file does not hold"):
        rethreshold(rows[1], 0.9)
    with pytest.raises(ValueError, match=r"earlier version, .*summarised, but not resumed"):
        ResultsFile(path, SETTINGS).__enter__()


NEW = ("best_span", "best_span_log_prob", "no_answer_log_prob", "n_best")


def test_write_official(tmp_path: Path) -> None:
    rows = [row("a", "é", na_prob=0.1), row("b", "?", (), na_prob=0.9), row("c", "", na_prob=0.5)]
    write_official(rows, tmp_path / "out")
    out = tmp_path / "out"
    assert json.loads((out / "predictions.json").read_text()) == {
        "a": "é",
        "b": "",
        "c": MALFORMED_PREDICTION,
    }
    assert json.loads((out / "na_prob.json").read_text()) == {"a": 0.1, "b": 0.9, "c": 0.5}
    write_official([*rows, row("d")], out)  # one row without: no file may speak for all
    assert [p.name for p in out.iterdir()] == ["predictions.json"]


def test_summarize() -> None:
    rows = [
        row("a", "the x", ("x",), na_prob=0.1),  # official right, strict wrong
        row("b", "x y", ("x",), na_prob=0.2),  # F1 2/3
        row("c", "?", (), na_prob=0.9, best_span="z"),
        row("d", "", (), na_prob=0.3),  # malformed: no abstention
    ]
    figures = summarize(rows)
    assert figures["n"] == 4
    assert figures["states"] == {"answer": 2, "no_answer": 1, "malformed": 1, "failed": 0}
    assert figures["% Valid JSON"] == 75.0
    assert figures["% Exact Match"] == 25.0
    assert figures["% EM for Valid JSON"] == pytest.approx(100 / 3)
    assert figures["% Correct No Answer"] == 50.0
    assert figures["% Correct Has Answer"] == 0.0
    assert (figures["exact"], figures["HasAns_exact"], figures["NoAns_exact"]) == (50.0, 50.0, 50.0)
    assert figures["f1"] == pytest.approx(100 * (1 + 2 / 3 + 1 + 0) / 4)
    # Abstaining from 0.2 on: a right, b wrong, c and d right.
    assert (figures["best_exact"], figures["best_exact_thresh"]) == (75.0, 0.1)
    assert figures["intervals"]["exact"] == pytest.approx([15.003898, 84.996102], abs=1e-5)
    assert figures["intervals"]["% Valid JSON"][1] < 100.0
    json.dumps(figures)


def test_summarize_has_no_figure_of_nothing() -> None:
    figures = summarize([row("a", "")])
    assert figures["% Correct No Answer"] is None
    assert figures["% EM for Valid JSON"] is None
    assert "NoAns_exact" not in figures
    assert set(figures["intervals"]) == {
        "% Valid JSON", "% Exact Match", "% Correct Has Answer",
        "exact", "f1", "HasAns_exact", "HasAns_f1",
    }  # fmt: skip
