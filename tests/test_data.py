"""Reading, checking, splitting and writing SQuAD records; and the stage that does all of it."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import create_squad_dataset
from llama_squad.arguments import CreateArguments
from llama_squad.config import load_run_config
from llama_squad.data import (
    count_split,
    expand_files,
    load_squad,
    read_files,
    read_hub,
    split_by_title,
    write_dataset,
)
from llama_squad.sources.cleaning import Cleaner
from llama_squad.sources.formats import InputRow

CONTEXT = "Velmor lies on the Ash. It was founded in 1655."


def squad(*titles: str, ids: str = "q") -> dict:
    """Make a file of one paragraph per title, with an answerable and an unanswerable question."""
    return {
        "version": "v2.0",
        "data": [
            {
                "title": title,
                "paragraphs": [
                    {
                        "context": f"{title}: {CONTEXT}",
                        "qas": [
                            {
                                "id": f"{ids}{n}a",
                                "question": " When was Velmor founded?",
                                "is_impossible": False,
                                "answers": [{"text": "1655", "answer_start": len(title) + 2 + 42}],
                            },
                            {
                                "id": f"{ids}{n}b",
                                "question": "Who founded Velmor?",
                                "is_impossible": True,
                                "answers": [],
                                "plausible_answers": [{"text": "Ash", "answer_start": 0}],
                            },
                        ],
                    }
                ],
            }
            for n, title in enumerate(titles)
        ],
    }


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(content: str, name: str = "train.json") -> str:
        path = tmp_path / name
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_read_files(write: Any) -> None:
    cleaner = Cleaner()
    records = read_files([write(squad("Velmor"))], cleaner)
    assert not cleaner.changed  # nothing of the official form counts as a change
    assert records == [
        {
            "id": "q0a",
            "title": "Velmor",
            "context": f"Velmor: {CONTEXT}",
            "question": " When was Velmor founded?",
            "answers": {"text": ["1655"], "answer_start": [50]},
        },
        {
            "id": "q0b",
            "title": "Velmor",
            "context": f"Velmor: {CONTEXT}",
            "question": "Who founded Velmor?",
            "answers": {"text": [], "answer_start": []},
        },
    ]
    assert count_split(records) == {
        "questions": 2, "answerable": 1, "paragraphs": 1, "titles": 1,
    }  # fmt: skip


def broken(change: Any) -> dict:
    content = copy.deepcopy(squad("A", "B"))
    change(content["data"][1]["paragraphs"][0])
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "train.json holds no questions"),
        ({"data": {}}, r"is of no known form \(data is no list\): expected SQuAD's JSON"),
        (
            broken(lambda p: p.pop("context")),
            r"no context, or an empty one: 2 \(first: \S*, data\[1\].paragraphs\[0\].qas\[0\], id 'q1a'\)",
        ),
        (broken(lambda p: p["qas"][1].pop("is_impossible") and p["qas"][1].pop("answers")), "no answers, and not marked is_impossible: 1"),
        (
            broken(lambda p: p["qas"][0].update(is_impossible=True)),
            r"is_impossible is true, but there are answers .*: 1 \(first: .* id 'q1a'\).*--mend takes 1 of these 1",
        ),
        (
            broken(lambda p: p["qas"][1].update(is_impossible=False)),
            r"is_impossible is false, but there is no answer: 1 \(first: .* id 'q1b'\)",
        ),
        (
            broken(lambda p: p["qas"][0]["answers"][0].update(text="1999")),
            r"an answer is not in its context: 1 \(first: .* id 'q1a'\)",
        ),
        (broken(lambda p: p["qas"][0]["answers"][0].update(text=" ")), "an answer is empty: 1"),
        (
            broken(lambda p: p["qas"][0]["answers"][0].update(text="l", answer_start=4)),
            r"answer_start is wrong, and the text is there several times \(--mend takes the nearest\): 1",
        ),
        (
            broken(lambda p: (p.update(context="Why? 1655 ?"), p["qas"][0].update(answers=[{"text": "?", "answer_start": 3}]))),
            r'a gold answer is "\?", which stands for no answer: 1 \(first: .* id \'q1a\'\)',
        ),
        (broken(lambda p: p["qas"][1].update(id="q0a")), r"another question has its id .*: 1 \(first: .* id 'q0a'\)"),
        (
            broken(lambda p: p.update(context=" ")),
            r"no context, or an empty one: 2 \(first: .* id 'q1a'\)",
        ),
        (broken(lambda p: p["qas"][0].update(question="")), "no question, or an empty one: 1"),
        (
            broken(lambda p: p["qas"][1].update(question="Who \ud83d?")),
            r"half a character in its text \(a lone surrogate.*: 1 \(first: .* id 'q1b'",
        ),
        (
            broken(lambda p: p.update(context=p["context"] + "\udfff")),
            r"half a character in its text \(a lone surrogate.*: 2 \(first: .* id 'q1a'",
        ),
        (broken(lambda p: p.update(qas={})), r"no list 'qas'.*: 1 \(first: \S*, data\[1\].paragraphs\[0\]\)"),
        (broken(lambda p: p["qas"].append("x")), r"not a JSON object: 1 \(first: .*qas\[2\]\)"),
        ({"data": []}, "train.json holds no questions"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_and_nothing_is_written(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(content)
    with pytest.raises(SystemExit) as exit_info:
        create_squad_dataset.main(["--train_files", path, "--validation_ratio=0"])
    assert re.search(message, str(exit_info.value.code))
    assert path in str(exit_info.value.code)
    assert [p.name for p in tmp_path.rglob("*")] == ["train.json"]


def test_faults_of_all_kinds_in_one_message() -> None:
    rows = [
        InputRow("row 1", {"id": "a", "context": "x", "question": "", "answer": "x"}),
        InputRow("row 2", {"id": "a", "context": "x", "question": "q", "answer": "y"}),
        InputRow("row 3", {"id": "b", "context": "x", "question": "q", "answer": "x"}),
        InputRow("row 4", {"id": "b", "context": "x", "question": "r", "answer": "x"}),
        InputRow("row 5", {"context": "x", "question": "r", "answer": "y"}),
    ]
    with pytest.raises(ValueError) as caught:
        Cleaner().clean(rows, "here.csv", "train")
    assert str(caught.value) == (
        "here.csv: no question, or an empty one: 1 (first: here.csv, row 1, id 'a'); "
        "an answer is not in its context: 2 (first: here.csv, row 2, id 'a'); "
        "another question has its id (--mend adds a number): 1 (first: here.csv, row 4, id 'b'). "
        "Nothing was written: --mend takes 1 of these 4, "
        "--skip_bad leaves the others out and lists what it left out beside the dataset."
    )


def test_expand_files(write: Any, tmp_path: Path) -> None:
    b, a = write("{}", "b.json"), write("{}", "a.json")
    pattern = str(tmp_path / "*.json")
    assert [str(p) for p in expand_files([b, pattern])] == [b, a]  # in order, and once each
    literal = write("{}", "a[1].json")
    write("{}", "a1.json")
    assert [str(p) for p in expand_files([literal])] == [literal]
    with pytest.raises(ValueError, match="no file matches 'nowhere"):
        expand_files(["nowhere/*.json"])


def test_split_keeps_titles_and_contexts_together() -> None:
    def record(n: Any, title: str, context: str) -> Any:
        return {"id": str(n), "title": title, "context": context}

    records = [record(n, f"t{n % 20}", f"c{n % 20}") for n in range(200)]
    # three titles are tied together by shared contexts
    records += [record(200, "t1", "c0"), record(201, "t2", "c1")]
    train, val = split_by_title(records, 0.25, seed=1)
    assert sorted(int(r["id"]) for r in train + val) == list(range(202))
    for key in ("title", "context"):
        assert not {r[key] for r in train} & {r[key] for r in val}
    assert 40 <= len(val) <= 61
    assert split_by_title(records, 0.25, seed=1) == (train, val)
    assert split_by_title(records, 0.25, seed=2) != (train, val)
    assert split_by_title(records, 0, seed=1) == (records, [])


def test_a_title_far_too_large_is_not_held_out() -> None:
    sizes = {"handbook": 1000, "faq": 40, "notes": 60}
    records: Any = [
        {"id": f"{t}{n}", "title": t, "context": f"{t}{n}"} for t in sizes for n in range(sizes[t])
    ]
    for seed in range(8):
        assert len(split_by_title(records, 0.05, seed)[1]) in (40, 60)
        assert len(split_by_title(records, 0.001, seed)[1]) == 40  # all are: the smallest


def test_split_that_is_impossible() -> None:
    records = [{"id": "a", "title": "t", "context": "c"}] * 3
    with pytest.raises(ValueError, match="--validation_ratio 0"):
        split_by_title(records, 0.1, 1)
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        split_by_title(records, 1.0, 1)


def test_stage(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train = write(squad(*"ABCDEFGHIJ"))
    test = write(squad("Y", ids="t"), "test.json")
    create_squad_dataset.main(
        ["--train_files", train, "--test_files", test, "--validation_ratio=0.2", "--prompt=multi_turn"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert re.search(r"train +16 +8 +8 +8\nval +4 +2 +2 +2\ntest +2 +1 +1 +1", out)
    assert "train and val hold the 20 questions" in out
    dataset = load_squad("data/squad_v2")
    assert {name: len(split) for name, split in dataset.items()} == {
        "train": 16,
        "val": 4,
        "test": 2,
    }
    row = dataset["test"][0]
    assert [m["role"] for m in row["messages"]] == ["system", *["user", "assistant"] * 3]
    assert row["messages"][-1]["content"] == '```json\n{\n  "answer": "1655"\n}\n```'
    assert row["answers"] == {"text": ["1655"], "answer_start": [45]}
    assert load_run_config("data/squad_v2")["create"]["prompt"] == "multi_turn"
    # again, over the old one; and no trace of the work beside it
    create_squad_dataset.main(["--test_files", test])
    assert list(load_squad("data/squad_v2")) == ["test"]
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["squad_v2"]


def test_named_files_beat_the_sample_of_the_configuration(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write("create: {sample: true, validation_ratio: 0}", "some.yaml")
    files = ["--train_files", write(squad("A"))]
    create_squad_dataset.main(["--config", config, *files])
    assert load_squad("data/squad_v2")["train"]["id"] == ["q0a", "q0b"]
    assert load_run_config("data/squad_v2")["create"]["sample"] is False
    with pytest.raises(SystemExit, match="--sample is another dataset than --train_files"):
        create_squad_dataset.main([*files, "--sample"])


def test_other_folders_are_left_alone(write: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    records = read_files([write(squad("A"))])
    with pytest.raises(ValueError, match="holds no dataset"):
        write_dataset({"train": records}, CreateArguments(dataset_name=str(tmp_path / "mine")))
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_an_empty_test_file_is_refused_by_name(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    test = write(squad(), "test.json")
    with pytest.raises(SystemExit, match=re.escape(f"{test} holds no questions")):
        create_squad_dataset.main(["--train_files", write(squad("A")), "--test_files", test])
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("folder", ["/proc/nope", "train.json/nope"])
def test_a_folder_that_cannot_be_written(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--train_files", write(squad("A")), "--validation_ratio=0", "--dataset_name", folder]
    with pytest.raises(SystemExit, match=f"cannot write the dataset to {folder} .*--dataset_name"):
        create_squad_dataset.main(argv)


def test_the_old_dataset_survives_a_failure_to_put_the_new_one_in_its_place(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    create_squad_dataset.main(["--test_files", write(squad("A"))])
    rename = Path.rename

    def fail(path: Path, target: Any) -> Any:
        if path.name == "new":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(SystemExit, match="No space left on device"):
        create_squad_dataset.main(["--test_files", write(squad("B", ids="t"), "t.json")])
    assert load_squad("data/squad_v2")["test"]["id"] == ["q0a", "q0b"]
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["squad_v2"]


def test_shared_contexts_with_the_test_split_are_told(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = ["--train_files", write(squad("A", "B")), "--test_files", write(squad("B", ids="t"), "t.json")]  # fmt: skip
    create_squad_dataset.main([*files, "--validation_ratio=0"])
    assert "2 training questions are about a context of the test split" in capsys.readouterr().err


def test_no_dataset_there() -> None:
    with pytest.raises(ValueError, match="create_squad_dataset.py --dataset_name nowhere"):
        load_squad("nowhere")


def test_hub_source_as_a_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's own code path, on a folder of parquet files as the Hub has them."""
    from datasets import Dataset

    def rows(split: Any) -> Any:
        answers = {"text": ["1655"], "answer_start": [42]}
        return Dataset.from_list(
            [
                {
                    "id": split,
                    "title": "t",
                    "context": CONTEXT,
                    "question": "When?",
                    "answers": answers,
                }
            ]
        )

    folder = tmp_path / "copy"
    folder.mkdir()
    rows("train").to_parquet(str(folder / "train.parquet"))
    rows("validation").to_parquet(str(folder / "validation.parquet"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    splits = read_hub(str(folder), Cleaner())
    assert [r["id"] for r in splits["train"] + splits["test"]] == ["train", "validation"]
    (folder / "validation.parquet").unlink()
    with pytest.raises(ValueError, match="has no split 'validation', only train"):
        read_hub(str(folder), Cleaner())


def test_hub_out_of_reach() -> None:
    code = "import create_squad_dataset as c; c.main(['--dataset_name', '/nonexistent/x'])"
    env = {"PATH": "/usr/bin", "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "cannot load 'rajpurkar/squad_v2'" in run.stderr
    assert "bring files: --train_files" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.slow
def test_real_squad(
    shared_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The complete data: the counts, and no context in two splits."""
    folder = shared_data / "squad_v2"
    create_squad_dataset.main(
        [
            "--dataset_name", str(tmp_path / "squad"),
            "--train_files", str(folder / "train-*.json"),
            "--test_files", str(folder / "dev.json"),
        ]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "the 129,943 questions of the training source" in out
    assert re.search(r"test +11,873 +5,928 +1,204 +35", out)
    dataset = load_squad(str(tmp_path / "squad"))
    contexts = {name: set(split["context"]) for name, split in dataset.items()}
    assert not contexts["train"] & contexts["val"]
    assert not contexts["test"] & (contexts["train"] | contexts["val"])
