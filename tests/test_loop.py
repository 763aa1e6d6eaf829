"""The quickstart's tuned model: what it reaches, and once around the loop, in a real browser."""

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import check_reader
import pytest
from browser import NO_BROWSER, free_port, open_page, select_words
from conftest import ROOT

from llama_squad.data import load_squad, read_files
from llama_squad.feedback import verdicts
from llama_squad.prompts import Record
from llama_squad.result_reader import read_results
from llama_squad.summary import summarize

pytestmark = pytest.mark.slow
CONFIG = ["--config", "configs/quickstart.yaml"]


def run(script: str, *flags: str) -> None:
    subprocess.run([sys.executable, script, *flags], cwd=ROOT, check=True)


@dataclass(frozen=True)
class Tuned:
    """The quickstart's dataset, its adapter, and its answers by span decoding."""

    data: str
    adapter: str
    spans: str


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("quickstart")
    made = Tuned(
        str(folder / "data"), str(folder / "out" / "final_checkpoints"), str(folder / "spans.csv")
    )
    data = [*CONFIG, "--dataset_name", made.data]
    run("create_squad_dataset.py", *data)
    run("train_llama_squad.py", *data, "--output_dir", str(folder / "out"))
    run("test_llama_squad.py", *data, "--adapter_name", made.adapter, "--output", made.spans)
    return made


def test_quickstart_meets_its_targets(tuned: Tuned, tmp_path: Path) -> None:
    """Its stages, run one after the other, reach what the quickstart is to show."""
    results = str(tmp_path / "tuned.csv")
    run(
        "test_llama_squad.py", *CONFIG, "--dataset_name", tuned.data, "--decoding=free",
        "--adapter_name", tuned.adapter, "--output", results,
    )  # fmt: skip
    figures = summarize(read_results(results))
    assert figures["n"] == 496
    assert figures["% Valid JSON"] >= 99
    assert figures["% Exact Match"] >= 85
    assert figures["% Correct No Answer"] >= 80
    assert figures["% Correct Has Answer"] >= 85


def test_reader_and_shell_answer_as_the_evaluation_does(
    tuned: Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the adapter's base is named from here
    asked, expected = check_reader.evaluated(tuned.spans, tuned.data, 60)
    assert len(expected) == 60
    assert "?" in expected.values()
    assert check_reader.by_reader(tuned.adapter, asked) == expected
    assert check_reader.by_shell(tuned.adapter, asked) == expected


class App:
    """The page, as its command serves it; killed at the end without a warning."""

    def __init__(self, tuned: Tuned, folder: Path) -> None:
        self._log = folder / f"log{time.monotonic_ns()}"
        with self._log.open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, "app.py", *CONFIG, "--dataset_name", tuned.data,
                 "--adapter_name", tuned.adapter, "--review", tuned.spans,
                 "--feedback", str(folder / "feedback.jsonl"), "--port", str(free_port())],
                cwd=ROOT, stdout=out, stderr=out,
            )  # fmt: skip

    def __enter__(self) -> str:
        for _ in range(1200):
            found = re.search(r"http://127\.0\.0\.1:\d+", self._log.read_text())
            if found:
                return found[0]
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.1)
        self._process.kill()
        raise AssertionError(self._log.read_text())

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(20)


def ask_one(page: Any, url: str, record: dict[str, Any], answer: str) -> None:
    """Ask a question that is answered right, and see the answer marked in the text."""
    page.goto(url)
    page.get_by_role("textbox", name="Text").fill(record["context"])
    page.get_by_role("textbox", name="Question").fill(record["question"])
    page.get_by_role("button", name="Ask", exact=True).click()
    mark = page.locator("#ask-text mark.answer")
    mark.wait_for()
    assert mark.inner_text() == answer


def start_review(page: Any, url: str) -> Any:
    page.goto(url)
    page.get_by_role("tab", name="Review").click()
    page.get_by_role("button", name="Start").click()
    shown = page.locator(".card .span").first
    shown.wait_for()
    return shown


def correct_one(page: Any, url: str, errors: dict[str, dict[str, Any]]) -> str:
    """Go to the first error that has an answer in its text, and mark it; return its id."""
    shown = start_review(page, url)
    for _ in range(len(errors)):
        question = page.locator(".card .span:visible").first.inner_text()
        id_, record = next((i, r) for i, r in errors.items() if r["question"] == question)
        if record["answers"]["text"]:
            break
        page.keyboard.press("s")
        shown.get_by_text(question, exact=True).wait_for(state="detached")
    answer = record["answers"]["text"][0]
    select_words(page, "#review-text", answer)
    page.locator(".card.good").get_by_text(answer, exact=True).wait_for()
    page.keyboard.press("m")
    page.get_by_text("1 of 496 judged here").wait_for()
    return id_


def export(page: Any, url: str, folder: Path) -> list[Record]:
    """Download what was corrected, by the page; return its records."""
    start_review(page, url)
    page.get_by_text("1 of 496 judged here").wait_for()  # it outlived the kill
    page.get_by_role("button", name="Files: your own questions").click()
    page.get_by_role("button", name="Export as SQuAD 2.0").click()
    link = page.locator("a[download='feedback.json']").first
    link.wait_for()
    with page.expect_download() as download:
        link.click()
    download.value.save_as(folder / "exported.json")
    return read_files([str(folder / "exported.json")])


@pytest.mark.skipif(bool(NO_BROWSER), reason=NO_BROWSER)
def test_once_around_the_loop(tuned: Tuned, tmp_path: Path) -> None:
    """Ask, correct, restart, export, rebuild, train 20 steps: it has learned, and forgotten none."""
    records = {row["id"]: row for row in load_squad(tuned.data)["test"]}
    rows = read_results(tuned.spans)
    errors = {r["id"]: records[r["id"]] for r in rows if not r["Exact match"]}
    assert any(record["answers"]["text"] for record in errors.values()), "nothing to correct"
    right = next(r for r in rows if r["Exact match"] and r["answers"])
    with open_page() as (page, abroad):
        with App(tuned, tmp_path) as url:
            ask_one(page, url, records[right["id"]], right["prediction_text"])
            corrected = correct_one(page, url, errors)
        with App(tuned, tmp_path) as url:
            (exported,) = export(page, url, tmp_path)
        assert abroad == []
    feedback = tmp_path / "feedback.jsonl"
    (verdict,) = verdicts.load(feedback).latest().values()
    assert (verdict.id, verdict.verdict) == (corrected, "marked")
    assert exported["id"] == corrected
    assert verdict.corrected == exported["answers"]["text"][0]
    assert verdict.adapter_digest and verdict.model_digest

    data, out = str(tmp_path / "data"), tmp_path / "out"
    loop = ["--config", "configs/feedback.yaml", "--dataset_name", data]
    run("create_squad_dataset.py", *loop, "--sample", "--validation_ratio", "0",
        "--feedback", str(feedback))  # fmt: skip
    run("train_llama_squad.py", *loop, "--from_adapter", tuned.adapter, "--output_dir", str(out),
        "--max_steps", "20", "--no_quantize", "--bf16", "False", "--report_to", "none")  # fmt: skip
    results = str(tmp_path / "after.csv")
    run("test_llama_squad.py", *CONFIG, "--dataset_name", tuned.data, "--output", results,
        "--adapter_name", str(out / "final_checkpoints"))  # fmt: skip
    after = {row["id"]: row for row in read_results(results)}
    assert after[corrected]["prediction_text"] == verdict.corrected
    figures = [summarize(found)["% Exact Match"] for found in (rows, list(after.values()))]
    assert figures[1] >= figures[0] - 1, json.dumps(figures)
