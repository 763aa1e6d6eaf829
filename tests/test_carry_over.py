"""Questions as people say them in the place of SQuAD's, and abstentions by class."""

import json
from pathlib import Path
from typing import Any

import abstentions
import disfl_qa
import pytest

from llama_squad.answers import Answer
from llama_squad.intervals import wilson_interval
from llama_squad.rows import HEADER, encode_rows, make_row


def qa(name: str) -> dict[str, Any]:
    return {"id": name, "question": f"What is {name}?", "answers": [], "is_impossible": True}


def ids(content: dict[str, Any]) -> list[str]:
    paragraphs = [p for article in content["data"] for p in article["paragraphs"]]
    assert all(p["qas"] for p in paragraphs)
    return [q["id"] for p in paragraphs for q in p["qas"]]


def test_disfluent_questions_take_the_place_of_the_plain_ones(tmp_path: Path) -> None:
    squad = {"version": "v2.0", "data": [
        {"title": "A", "paragraphs": [{"context": "One.", "qas": [qa("a"), qa("b")]},
                                      {"context": "Two.", "qas": [qa("c")]}]},
        {"title": "B", "paragraphs": [{"context": "Three.", "qas": [qa("d")]}]},
        {"title": "C", "paragraphs": [{"context": "Four.", "qas": [qa("e")]}]},
    ]}  # fmt: skip
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    for name, keys in (("one", "eb"), ("two", "a?")):
        said = {k: {"original": "", "disfluent": f"Er no {k}?"} for k in keys}
        (tmp_path / f"{name}.json").write_text(json.dumps(said))
    disfl_qa.main([
        f"--squad={tmp_path}/squad.json", f"--output_dir={tmp_path}/out", "--disfl_qa",
        f"{tmp_path}/one.json", f"{tmp_path}/two.json",
    ])  # fmt: skip
    plain, disfluent = (
        json.loads((tmp_path / "out" / f"{name}.json").read_text())
        for name in ("plain", "disfluent")
    )
    assert ids(plain) == ids(disfluent) == ["a", "b", "e"]
    assert [article["title"] for article in plain["data"]] == ["A", "C"]
    assert plain["data"][1]["paragraphs"][0]["qas"] == [qa("e")]
    said_now = disfluent["data"][1]["paragraphs"][0]["qas"][0]
    assert said_now == qa("e") | {"question": "Er no e?"}


def test_shares_of_each_class() -> None:
    def row(name: str, state: str, *golds: str) -> dict[str, Any]:
        return {"id": name, "state": state, "answers": list(golds)}

    rows = [
        row("1", "no_answer"), row("2", "answer"), row("3", "malformed"),
        row("4", "no_answer"), row("5", "no_answer"),
        row("6", "no_answer", "gold"),  # as its file tells now, it has an answer
    ]  # fmt: skip
    classes = {"1": "E", "2": "E", "3": "E", "4": "#", "6": "X"}
    found = abstentions.count(rows, classes)
    assert list(found) == ["E", "#", "all"]
    assert (found["E"]["n"], found["E"]["abstained"]) == (3, 1)
    assert found["E"]["share"] == pytest.approx(100 / 3)
    assert found["E"]["interval"] == list(wilson_interval(1, 3))
    assert found["all"]["n"] == 4


def test_unknown_classes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "classes.tsv").write_text("qid\treason\n1\tE\n2\tQ\n")
    with pytest.raises(ValueError, match="'Q'"):
        abstentions.read_classes(str(tmp_path / "classes.tsv"))
    (tmp_path / "classes.tsv").write_text("id\treason\n1\tE\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['qid'\]"):
        abstentions.read_classes(str(tmp_path / "classes.tsv"))


def test_the_real_classes(shared_data: Path) -> None:
    found = abstentions.read_classes(str(shared_data / "qa/squad2_cr/reason_gold_test.tsv"))
    assert len(found) == 3106
    assert set(found.values()) == set(abstentions.CLASSES)


def test_a_file_without_such_questions(tmp_path: Path) -> None:
    (tmp_path / "classes.tsv").write_text("qid\treason\nnowhere\tE\n")
    rows = tmp_path / "rows.csv"
    record = {"id": "1", "title": "", "context": "One.", "question": "Who?",
              "answers": {"text": [], "answer_start": []}}  # fmt: skip
    row = make_row(record, "", Answer("malformed", ""), "", None)
    rows.write_bytes(HEADER + encode_rows([row]))
    with pytest.raises(SystemExit, match="holds no question"):
        abstentions.main([str(rows), str(tmp_path / "classes.tsv")])
