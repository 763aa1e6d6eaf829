"""Other projects' files: every form, what is mended and dropped, and the page about it."""

import csv
import json
import re
import shlex
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import create_squad_dataset
from llama_squad.data import load_squad

CONTEXT = "Velmor lies on the Ash. It was founded in 1655."


@pytest.fixture
def stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Run the stage on a file of the given name and content; return the test split and the output."""
    monkeypatch.chdir(tmp_path)

    def run(content: Any, name: str = "test.json", *flags: str) -> tuple[list[dict], str]:
        if not isinstance(content, bytes):
            text = content if isinstance(content, str) else json.dumps(content)
            content = text.encode()
        Path(name).write_bytes(content)
        try:
            create_squad_dataset.main(["--test_files", name, *flags])
        except SystemExit as error:
            return [], str(error.code)
        return list(load_squad("data/squad_v2")["test"]), capsys.readouterr().out

    return run


# The page ------------------------------------------------------------------------------------


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Return (language, content, name of the file that the line before ends in) of each block."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in re.finditer(r"^```(\w+)\n(.*?\n)```$", text, re.M | re.S):
        name = re.search(r"`([\w.]+)`:\s*$", text[: block.start()])
        found.append((block.group(1), block.group(2), name.group(1) if name else ""))
    return found


def test_the_page_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file of docs/own-data.md is read by the command below it, with the output below that."""
    monkeypatch.chdir(tmp_path)
    output = ""
    counts = {"files": 0, "commands": 0, "outputs": 0}
    for language, content, name in blocks(ROOT / "docs" / "own-data.md"):
        if name:
            Path(name).write_text(content, encoding="utf-8")
            counts["files"] += 1
        elif language == "bash":
            _, script, *argv = shlex.split(content)
            assert script == "create_squad_dataset.py"
            try:
                create_squad_dataset.main(argv)
                output = capsys.readouterr().out
            except SystemExit as error:
                output = f"{error.code}\n"
            counts["commands"] += 1
        elif content.startswith("why,"):
            assert Path("data/mine/dropped.csv").read_text() == content
        else:
            assert language == "text"
            assert content in output, output
            counts["outputs"] += 1
    assert counts == {"files": 7, "commands": 5, "outputs": 5}


def test_says_what_it_replaces(stage: Any) -> None:
    """A dataset of other files is replaced, as asked, but not unsaid."""
    said = "of first.json that was there is replaced"
    assert "replaced" not in stage(qa([]), "first.json")[1]
    assert "replaced" not in stage(qa([]), "first.json")[1]
    assert said in stage(qa([]), "second.json")[1]
    Path("data/squad_v2/llama_squad.json").write_text("{")  # nothing tells: that is no error
    assert "replaced" not in stage(qa([]), "first.json")[1]


@pytest.mark.parametrize("answers", [[], "", None, {"text": [], "answer_start": []}])
def test_an_answer_beside_empty_answers_counts(stage: Any, answers: Any) -> None:
    row = {"context": CONTEXT, "question": "When?", "answers": answers, "answer": "1655"}
    (record,), _ = stage([row])
    assert record["answers"] == {"text": ["1655"], "answer_start": [42]}
    for none in ("", "?"):
        (record,), _ = stage([{**row, "answer": none}])
        assert record["answers"]["text"] == []


# Forms ---------------------------------------------------------------------------------------


def qa(answers: Any, **more: Any) -> dict:
    """Make a file of SQuAD's form that holds one question."""
    entry = {"id": "q", "question": "When?", "answers": answers, **more}
    entry = {key: value for key, value in entry.items() if value != "absent"}
    return {"data": [{"title": "Velmor", "paragraphs": [{"context": CONTEXT, "qas": [entry]}]}]}


def row(**more: Any) -> dict:
    return {"id": "q", "title": "t", "context": CONTEXT, "question": "When?", **more}


YEAR = {"text": ["1655"], "answer_start": [42]}
NONE: dict = {"text": [], "answer_start": []}


@pytest.mark.parametrize(
    ("content", "name", "answers"),
    [
        (qa([{"text": "1655", "answer_start": 42}]), "a.json", YEAR),
        (qa([{"text": "1655", "answer_start": "42"}]), "a.json", YEAR),
        (qa([{"text": "1655"}]), "a.json", YEAR),
        (qa([{"text": "1655", "answer_start": -1}]), "a.json", YEAR),
        (qa("absent", is_impossible=True), "a.json", NONE),
        (qa("absent", is_impossible=True, plausible_answers=[{"text": "Ash", "answer_start": 19}]), "a.json", NONE),
        (qa([{"text": "", "answer_start": -1}], is_impossible=1), "a.json", NONE),
        ([row(answer="1655")], "a.json", YEAR),
        ({"version": "1", "data": [row(answers=["1655"])]}, "a.json", YEAR),
        (row(answers={"text": "1655", "answer_start": 42}), "a.json", YEAR),
        (row(answer=1655), "a.jsonl", YEAR),
        (json.dumps(row(answers=YEAR)) + "\n\n", "a.jsonl", YEAR),
        (json.dumps(row(answer="1655")) + "\n" + json.dumps(row(id="r", answer="")), "a.json", YEAR),
        (row(answer=None), "a.jsonl", NONE),
        ('{"context": "a", "question": "b", "answer": NaN}', "a.jsonl", NONE),
        (row(answers={"text": [""], "answer_start": [-1]}), "a.ndjson", NONE),
        (f"\ufeffContext,Question,Answer\n{CONTEXT},When?,1655\n", "a.csv", YEAR),
        (f"id;context;question;answer\n1;{CONTEXT};When?;1655\n".encode("utf-16"), "a.csv", YEAR),
        (f"context\tquestion\tanswer\tanswer_start\r\n{CONTEXT}\tWhen?\t1655\t42.0\r\n", "a.tsv", YEAR),
        (f"context,question,answers\n{CONTEXT},When?,\"['1655']\"\n", "a.csv", YEAR),
        (f"context,question,answers\n{CONTEXT},When?,\"{{'text': ['1655'], 'answer_start': [42]}}\"\n", "a.csv", YEAR),
        (f"context,question,answers\n{CONTEXT},When?,\"{{'text': array(['1655'], \n dtype=object), 'answer_start': array([42], dtype=int32)}}\"\n", "a.csv", YEAR),
        (f"context,question,answers\n{CONTEXT},When?,\"{{'text': array([], dtype=object), 'answer_start': array([], dtype=int32)}}\"\n", "a.csv", NONE),
        (f"context,question,answer\n{CONTEXT},When?,\n", "a.csv", NONE),
        (f"context,question,answer,is_impossible\n{CONTEXT},When?,,TRUE\n", "a.csv", NONE),
        (f'context,question,answer\n"{CONTEXT}{" x" * 100_000}",When?,1655\n', "a.csv", YEAR),
    ],
)  # fmt: skip
def test_forms(stage: Any, content: str, name: str, answers: Any) -> None:
    records, output = stage(content, name)
    assert records, output
    assert records[0]["answers"] == answers
    assert records[0]["messages"][-1]["content"].count("1655" if answers["text"] else '"?"') == 1


def test_parquet_as_the_hub_has_it(stage: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [row(answers=YEAR, extra=1), row(id="r", answers=NONE, extra=2)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "hub.parquet"))
    records, output = stage((tmp_path / "hub.parquet").read_bytes(), "hub.parquet")
    assert [r["answers"] for r in records] == [YEAR, NONE]
    assert "Taken with changes" not in output
    assert "is not parquet" in stage(b"PAR1 but no more", "bad.parquet")[1]


def test_a_line_end_within_a_context_is_no_line_of_json(stage: Any) -> None:
    text = "One\u2028two \u0085three."
    content = json.dumps({"context": text, "question": "q", "answer": "two"}, ensure_ascii=False)
    records, _ = stage(content, "a.jsonl")
    assert [r["context"] for r in records] == [text]


VERDICT = {"verdict": "wrong", "corrected": None, "corrected_start": None, "uid": "7", "undoes": ""}


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ({"5a66": {"original": "Who?"}}, "a.json", r"a.json is of no known form \(keys 5a66\): expected"),
        ({"context": ["c"], "question": ["q"]}, "a.json", r"of no known form \(keys context, question\)"),
        ('{"data": []}}', "a.json", "a.json is not JSON: Extra data: line 1"),
        ('{\n"data": []}\n}', "a.json", "a.json is not JSON: Extra data: line 3"),
        ([{"q": "Who?"}], "a.json", r"a.json lacks context, question \(it has q, answer\): expected"),
        ('{"text": "x"}\n', "a.jsonl", r"a.jsonl lacks context, question \(it has text, answer\)"),
        ("qid\treason\n5ad\tI\n", "a.tsv", r"a.tsv lacks context, question, answer \(it has qid, reason\)"),
        ("context,question\nc,q\n", "a.csv", r"a.csv lacks answer \(it has context, question\)"),
        ("", "a.csv", r"a.csv lacks context, question, answer \(it has nothing\)"),
        ("context,question,answer\n", "a.csv", "a.csv holds no questions: name another file"),
        ("", "a.jsonl", "a.jsonl holds no questions: name another file"),
        ("\n", "a.json", "a.json holds no questions: name another file"),
        (b"PK\x03\x04\x00\xff", "a.xlsx", "a.xlsx is no text, but binary, as a spreadsheet's own .*: export it as CSV"),
        ('question,answer,context\nWho?,Ann,"Ann came.\nWhen?,noon,It was noon.\n', "a.csv", r"a.csv, row 2: not CSV \(unexpected end of data\): a cell that begins with a quote"),
        ('question,answer,context\nWho?,Ann,Ann.\nWho?,Ann,"Ann came.\nWhen?,noon,"It was noon, then."\n', "a.csv", r"a.csv, row 3: not CSV \(',' expected after '\"'\)"),
        (b"\xe9", "a.json", r"a.json is not UTF-8 text \(.*position 0.*\): save it as UTF-8"),
        ("context,question,answer\na b,c,d,e\n", "a.csv", r"more cells than columns \(a text with ',' needs quotes\): 1 \(first: a.csv, row 2\)"),
        ('{"context": "c", "question": "q", "answer": "c"}\n{"context"\n7\n', "a.jsonl", r"not JSON \(.*\): 1 \(first: a.jsonl, line 2\); not a JSON object: 1 \(first: a.jsonl, line 3\)"),
        (row(answer=True), "a.jsonl", r"an answer is no text: 1 \(first: a.jsonl, line 1, id 'q'\)"),
        (row(answer="1655", is_impossible="maybe"), "a.jsonl", "is_impossible is neither true nor false: 1"),
        (row(answer="", is_impossible="false"), "a.jsonl", "is_impossible is false, but there is no answer: 1"),
        (row(answer=" ? "), "a.jsonl", r"""a gold answer is "\?", which stands for no answer: 1 \(first: a.jsonl, line 1, id 'q'\)"""),
        (row(), "a.jsonl", "no answers, and not marked is_impossible: 1"),
        (row(answer="c", **VERDICT), "a.jsonl", r"a.jsonl holds verdicts of a review, not questions \(line 1\): give it as --feedback"),
        (row(answer="c", **VERDICT), "a.json", "a.json holds verdicts of a review"),
        ('{"n": %s}' % ("9" * 5000), "a.jsonl", r"not JSON \(Exceeds the limit .*\): 1 \(first: a.jsonl, line 1\)"),
        ('[%s]' % ("9" * 5000), "a.json", "a.json is not JSON: Exceeds the limit"),
    ],
)  # fmt: skip
def test_what_is_refused(stage: Any, content: str, name: str, message: str) -> None:
    records, output = stage(content, name)
    assert not records
    assert re.search(message, output), output
    assert "mend the file" not in output.lower()
    assert not Path("data").exists()


# Mending -------------------------------------------------------------------------------------


def test_ids_and_titles(stage: Any) -> None:
    content = qa([], id=7)
    del content["data"][0]["title"]
    records, output = stage(content)
    assert (records[0]["id"], records[0]["title"]) == ("7", "test.json: data[0]")
    assert (
        "1  id: a number, taken as text (first: test.json, data[0].paragraphs[0].qas[0])" in output
    )
    assert "1  title: none, made from file and place (first: test.json, data[0]" in output
    records, _ = stage([row(id=7.0, title=None, answer="")])  # as pandas writes ids
    assert (records[0]["id"], records[0]["title"]) == ("7", "test.json: [0]")


def test_two_files_of_one_name_make_different_ids(stage: Any, tmp_path: Path) -> None:
    table = f"context,question,answer\n{CONTEXT},When?,1655\n"
    Path("other").mkdir()
    Path("other/test.csv").write_text(table.replace("When", "In what year"))
    records, _ = stage(table, "test.csv", "other/test.csv")
    assert [r["id"] for r in records] == ["test.csv: row 2", "other/test.csv: row 2"]


ACCENT = "Beyoncé met Jay in Orléans.\nOrléans is old, Jay said: “so it is” – and left."


@pytest.mark.parametrize(
    ("context", "answer", "start", "expected"),
    [
        (CONTEXT, "Ash", 3, (19, "Ash")),  # the text occurs once
        ("\ufeff" + CONTEXT, "Ash", 19, (20, "Ash")),  # a byte-order mark that was not counted
        (ACCENT.replace("\n", "\r\n"), "left", 71, (72, "left")),  # a line end counted as one
        (ACCENT.replace("\n", "\r\n"), "Orléans.\nOrléans", 19, (19, "Orléans.\r\nOrléans")),
        (unicodedata.normalize("NFD", ACCENT), "Beyoncé", 0, (0, "Beyonce\u0301")),
        (ACCENT, "Beyonce\u0301", 0, (0, "Beyoncé")),
        (ACCENT.replace(" ", "\xa0"), "is old", 36, (36, "is\xa0old")),
        (ACCENT, '"so it is" - and', 54, (54, "“so it is” – and")),
        ("a co\u00adoperative  mill", "cooperative mill", 2, (2, "co\u00adoperative  mill")),
        ("Seoul: 한국어", unicodedata.normalize("NFD", "한국어"), 7, (7, "한국어")),
        (unicodedata.normalize("NFD", "Seoul: 한국어"), "한국", 7, (7, unicodedata.normalize("NFD", "한국"))),
        ("in ½ hour", "½", None, (3, "½")),
    ],
)  # fmt: skip
def test_what_is_clear_is_mended(
    stage: Any, context: str, answer: Any, start: int, expected: Any
) -> None:
    value = {"text": answer, "answer_start": start}
    records, output = stage([row(context=context, answers=[value])])
    assert records, output
    assert records[0]["answers"] == {"text": [expected[1]], "answer_start": [expected[0]]}
    assert records[0]["context"] == context
    assert ("answer_start: wrong, mended" in output) == (start not in (None, expected[0]) or answer != expected[1])  # fmt: skip
    assert ("answer: written as its context has it" in output) == (answer != expected[1])


def test_no_half_of_a_character_is_an_answer(stage: Any) -> None:
    """What folds into several characters is found whole or not at all: no "1" in "½"."""
    _, output = stage([row(context="in ½ hour", answer="1")])
    assert "an answer is not in its context: 1" in output


OWLS = "🦉🦉🦉🦉🦉🦉 ÉÉÉÉÉÉÉ\r\n\r\n\r\nowl " * 4
PLACES = [match.start() for match in re.finditer("owl", OWLS)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "count",
    [
        lambda before: len(before.encode()),
        lambda before: len(before.encode("utf-16-le")) // 2,
        lambda before: len(before.replace("\r\n", "\n")),
        lambda before: len(unicodedata.normalize("NFD", before)),
        lambda before: len(before) - 1,
    ],
    ids=["bytes", "utf-16", "lf", "nfd", "off by one"],
)
def test_mend_takes_the_nearest_place_however_offsets_are_counted(
    stage: Any, place: Any, count: Any
) -> None:
    start = count(OWLS[:place])
    content = [row(context=OWLS, answers={"text": ["owl"], "answer_start": [start]})]
    records, output = stage(content)
    assert not records
    assert "the text is there several times (--mend takes the nearest): 1" in output
    records, output = stage(content, "test.json", "--mend")
    assert records[0]["answers"] == {"text": ["owl"], "answer_start": [place]}


def test_answers_without_offsets_that_occur_several_times_are_counted(stage: Any) -> None:
    records, output = stage([row(context=OWLS, answer="owl")])
    assert records[0]["answers"] == {"text": ["owl"], "answer_start": [20]}
    assert "1  answer_start: none, the first of several places taken" in output


def test_impossible_with_answers(stage: Any) -> None:
    content = qa([{"text": "1655", "answer_start": 42}], is_impossible=True)
    _, output = stage(content)
    assert "is_impossible is true, but there are answers (--mend leaves them out): 1" in output
    assert "--mend takes 1 of these 1, --skip_bad leaves it out" in output
    records, output = stage(content, "test.json", "--mend")
    assert records[0]["answers"] == NONE
    assert "1  answers: left out, since marked is_impossible (--mend)" in output


def test_the_same_id_twice(stage: Any) -> None:
    same = [row(answer="1655"), row(answer="in 1655"), row(answer="1655")]
    records, output = stage(same)
    assert [r["answers"]["text"] for r in records] == [["1655", "in 1655"]]
    assert "2  joined to the same question before it" in output
    _, output = stage([row(answer="1655"), row(answer="")])
    assert "it is there before, and only one of the two has an answer: 1" in output
    other = [row(answer="1655", question=f"{n}?") for n in range(3)]
    _, output = stage([*other, row(id="q-2", answer="")])
    assert "another question has its id (--mend adds a number): 2" in output
    records, output = stage([row(id="q-2", answer=""), *other], "test.json", "--mend")
    assert [r["id"] for r in records] == ["q-2", "q", "q-3", "q-4"]
    assert "2  id: another question had it, a number added (--mend)" in output


def test_a_question_that_got_a_number_is_known_by_the_id_it_had(stage: Any) -> None:
    """Ids may stand for paragraphs; a question's rows are joined, and stay in one split."""
    rows = [row(answer="1655"), row(question="Two?", answer="1655"),
            row(question="Two?", answer="in 1655")]  # fmt: skip
    records, output = stage(rows, "test.json", "--mend")
    assert [(r["id"], r["answers"]["text"]) for r in records] == [
        ("q", ["1655"]), ("q-2", ["1655", "in 1655"]),
    ]  # fmt: skip
    assert "1  joined to the same question before it" in output
    records, output = stage(rows, "test.json", "--skip_bad")  # not joined to what was left out
    assert [(r["id"], r["answers"]["text"]) for r in records] == [("q", ["1655"])]
    assert "Left out: 2" in output
    more = [row(id="q-2", question="Two?", answer=text) for text in ("1655.", "on the Ash")]
    records, _ = stage([*rows[:2], *more], "test.json", "--mend")
    assert [r["answers"]["text"] for r in records] == [["1655"], ["1655", "1655.", "on the Ash"]]
    Path("train.json").write_text(json.dumps(rows[:2]))
    flags = ("--train_files", "train.json", "--validation_ratio=0", "--mend")
    _, output = stage(rows[1:2], "test.json", *flags)
    assert "it is in the train split too, same id and text" in output


def test_tables_as_spreadsheets_leave_them(stage: Any) -> None:
    """Empty rows at the end, a space behind the delimiter, a cell that looks like a list."""
    text = "See [3] and {{1}}. It was founded in 1655."
    table = f'id,context,question,answers\na,"{text}",When?, 1655\nb,"{text}",What?,[3]\n,,,\n,,,\n'
    records, _ = stage(table + f'c,"{text}",Which?,{{{{1}}}}\n', "test.csv")
    assert [r["answers"] for r in records] == [
        {"text": [words], "answer_start": [text.index(words)]} for words in ("1655", "[3]", "{{1}}")
    ]
    # lists are lists, though the text holds them too
    text = "In [39] a 1655 fire, x = []; it was founded in 1655."
    table = f"""id,context,question,answers,answer_start\na,"{text}",Q?,['1655'],[47]\nb,"{text}",R?,[],[]\n"""
    records, _ = stage(table.replace("[39]", "[47]"), "test.csv")
    assert [r["answers"] for r in records] == [
        {"text": ["1655"], "answer_start": [47]}, {"text": [], "answer_start": []},
    ]  # fmt: skip
    _, output = stage("id,context,question,answer,answer\na,x y,Q?,x,y\n", "test.csv")
    assert "has the column answer more than once" in output
    _, output = stage("id,context,question,answers\na,x y,Q?,{{1}}\n", "test.csv")
    assert "an answer is not in its context" in output


@pytest.mark.parametrize("name", ["test.json", "test.jsonl"])
def test_what_is_nested_too_deeply_is_one_line(stage: Any, name: str) -> None:
    _, output = stage("[" * 100_000, name)
    assert "nested too deeply" in output


def test_train_and_test_with_the_same_ids(stage: Any) -> None:
    """Neither file is at fault where both are numbered from 0, or one is given twice."""
    train = [row(id=n, context=f"{n} {CONTEXT}", answer="1655") for n in range(4)]
    test = [row(id=n, context=f"{n} other {CONTEXT}", answer="1655") for n in range(4)]
    Path("train.json").write_text(json.dumps(train))
    flags = ("--train_files", "train.json", "--validation_ratio=0")
    _, output = stage(test, "test.json", *flags)
    assert (
        "test.json: another question of the train split has its id (--mend adds a number): 4"
        in output
    )
    assert "mend the file" not in output.lower()
    records, _ = stage(test, "test.json", *flags, "--mend")
    assert [r["id"] for r in records] == ["0-2", "1-2", "2-2", "3-2"]
    _, output = stage(train, "test.json", *flags)
    assert "it is in the train split too, same id and text (name another file for one): 4" in output
    assert "mend the file" not in output.lower()
    records, output = stage([*train, *[row(id="x", answer="")]], "test.json", *flags, "--skip_bad")
    assert [r["id"] for r in records] == ["x"]
    assert "Left out: 4, listed in data/squad_v2/dropped.csv:" in output


def test_skip_bad_lists_what_it_left_out(stage: Any) -> None:
    content = qa([{"text": "1655", "answer_start": 42}])
    qas = content["data"][0]["paragraphs"][0]["qas"]
    qas += [{**qas[0], "id": 8, "answers": [{"text": "1999", "answer_start": 2}]}]
    qas += [{**qas[0], "id": "\ud83d", "question": ""}, "x"]
    content["data"].append({"title": "t"})
    records, output = stage(content, "test.json", "--skip_bad")
    assert [r["id"] for r in records] == ["q"]
    assert "Left out: 4, listed in data/squad_v2/dropped.csv:" in output
    assert (
        "1  an answer is not in its context (first: test.json, data[0].paragraphs[0].qas[1], id '8')"
        in output
    )
    with open("data/squad_v2/dropped.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["why", "file", "place", "id"],
            ["an answer is not in its context", "test.json", "data[0].paragraphs[0].qas[1]", "8"],
            [
                "no question, or an empty one",
                "test.json",
                "data[0].paragraphs[0].qas[2]",
                r"\ud83d",
            ],
            ["not a JSON object", "test.json", "data[0].paragraphs[0].qas[3]", ""],
            ["no list 'qas' (and no 'paragraphs')", "test.json", "data[1]", ""],
        ]
    config = json.loads(Path("data/squad_v2/llama_squad.json").read_text())
    assert config["questions"]["dropped"]["not a JSON object"] == 1
    # the next dataset leaves nothing out, and its folder has no old list
    stage(qa([]), "test.json")
    assert not Path("data/squad_v2/dropped.csv").exists()
    _, output = stage([row(answer="1999")], "test.json", "--skip_bad")
    assert (
        "test.json holds no questions but what --skip_bad left out (an answer is not in its"
        in output
    )


# Splits --------------------------------------------------------------------------------------

FORMS = [
    "Orléans is old. It lies on the Loire.",
    "Orléans is old. It lies on the Loire. \n",
    " Orléans is  old.\r\nIt lies on the Loire.",
    unicodedata.normalize("NFD", "Orléans is old. It lies on the Loire."),
    "\ufeffOrléans is old.\xa0It lies on the Loire.",
]


@pytest.mark.parametrize("form", FORMS[1:])
def test_contexts_that_differ_in_form_only_stay_on_one_side(stage: Any, form: Any) -> None:
    rows = [row(id=f"{n}", title=f"t{n}", context=f"{n}. {CONTEXT}", answer="") for n in range(6)]
    rows += [row(id="a", title="a", context=FORMS[0], answer="")]
    rows += [row(id="b", title="b", context=form, answer="")]
    Path("train.json").write_text(json.dumps(rows))
    for seed in range(8):
        stage([row(id="x", answer="")], "test.json", "--train_files", "train.json", "--validation_ratio=0.4", f"--seed={seed}")  # fmt: skip
        dataset = load_squad("data/squad_v2")
        sides = [name for name in ("train", "val") if {"a", "b"} & set(dataset[name]["id"])]
        assert len(sides) == 1
        assert len(dataset["val"]) >= 2


@pytest.mark.parametrize("form", FORMS)
def test_contexts_shared_with_test_are_told_whatever_their_form(
    stage: Any, capsys: pytest.CaptureFixture[str], form: Any
) -> None:
    rows = [row(id="a", context=FORMS[0], answer=""), row(id="b", answer="")]
    Path("train.json").write_text(json.dumps(rows))
    create_squad_dataset.main(["--train_files", "train.json", "--validation_ratio=0"])
    capsys.readouterr()
    Path("test.json").write_text(json.dumps([row(id="x", context=form, answer="")]))
    create_squad_dataset.main(
        ["--train_files", "train.json", "--validation_ratio=0", "--test_files", "test.json"]
    )
    assert (
        "Warning: 1 training questions are about a context of the test split"
        in capsys.readouterr().err
    )
