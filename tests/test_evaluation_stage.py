"""test_llama_squad.py on a small dataset with a tiny model of random weights."""

import csv
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Never

import pytest
from audit import AUDIT_BEAMS, LEAST_NOISE, Audit, audit
from audit import main as audit_main
from conftest import ROOT
from helpers import make_records, replies_in, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

import test_llama_squad
from llama_squad import modeling, thresholds
from llama_squad.answers import NO_ANSWER, format_answer
from llama_squad.arguments import CreateArguments, EvalArguments, resolve_decoding
from llama_squad.calibration import Calibration, sigmoid
from llama_squad.config import load_yaml, save_run_config
from llama_squad.data import write_dataset
from llama_squad.decoding.boundaries import is_span
from llama_squad.decoding.replies import Reply, Span
from llama_squad.encoding import ChatEncoder
from llama_squad.evaluation import evaluate
from llama_squad.folders import THRESHOLD_FILE
from llama_squad.predictors.base import Prediction
from llama_squad.predictors.local import LocalModel
from llama_squad.prompts import build_messages
from llama_squad.reader import Reader
from llama_squad.result_reader import read_results
from llama_squad.results import ResultsFile, config_path
from llama_squad.rows import rethreshold
from llama_squad.summary import summarize

pytestmark = pytest.mark.usefixtures("narrow")

PYTHON = sys.executable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, a LoRA adapter of it, and a dataset of 14 test questions on 5 paragraphs."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("stage")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    for path in (root / "model", root / "adapter"):
        tokenizer.save_pretrained(path)
    model.save_pretrained(root / "model")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    adapted.peft_config["default"].base_model_name_or_path = str(root / "model")
    adapted.save_pretrained(str(root / "adapter"))
    save_run_config(
        root / "adapter", "train", prompt="single_turn", system_prompt="Only the text counts.",
        train={"reasoning_tokens": 0},
    )  # fmt: skip
    splits = {
        "train": make_records(2, [1], seed=1),
        "val": make_records(3, [4], seed=2),
        "test": make_records(5, [2, 4], seed=3),
    }
    create = CreateArguments(dataset_name=str(root / "data"))
    write_dataset(splits, create)
    return root


@pytest.fixture
def run(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the stage; returns the rows."""
    monkeypatch.chdir(tmp_path)

    def stage(*flags: str, model: Any = True) -> Any:
        which = [f"--model_name={folder}/model"] if model else []
        test_llama_squad.main([*which, f"--dataset_name={folder}/data", *SMALL, *flags])
        return read_results("results/results.csv")

    return stage


SMALL = ("--batch_size=4", "--max_new_tokens=12")


def test_rows_hold_spans_or_abstain(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run("--predictions_dir=official", "--n_best=2")
    contexts = {record["id"]: record["context"] for record in make_records(5, [2, 4], seed=3)}
    assert [row["id"] for row in rows] == list(contexts)
    for row in rows:
        text = row["prediction_text"]
        assert row["state"] == ("no_answer" if text == NO_ANSWER else "answer")
        assert text == NO_ANSWER or is_span(contexts[row["id"]], text)
        assert json.loads(row["completion"].removeprefix("```json\n").removesuffix("\n```")) == {
            "answer": text
        }
        assert contexts[row["id"]] in row["Prompt"]
        assert (row["na_prob"] > 0.5) == (text == NO_ANSWER)
    for row in rows:
        spans = {span["text"]: span for span in row["n_best"]}
        assert len(spans) == 2
        best = spans[row["best_span"]]
        assert best["log_prob"] == row["best_span_log_prob"]
        odds = math.exp(row["no_answer_log_prob"] - best["log_prob"])
        assert row["na_prob"] == pytest.approx(odds / (1 + odds), abs=1e-6)
        nothing = best["probability"] * odds
        assert nothing + sum(span["probability"] for span in spans.values()) == pytest.approx(1)
    assert json.loads(Path("official/na_prob.json").read_text()) == {
        row["id"]: row["na_prob"] for row in rows
    }
    out = capsys.readouterr()
    assert "strict equality" in out.out
    assert "Next: python summarize_results.py results/results.csv" in out.out
    assert out.err.count("running on the CPU") <= 1


def test_free_decoding_writes_what_the_model_says(run: Any) -> None:
    rows = run("--decoding=free", "--num_samples=5")
    settings = json.loads(config_path(Path("results/results.csv")).read_text())
    assert settings["stop_after_answer"] is True
    assert len(rows) == 5
    assert {row["na_prob"] for row in rows} == {None}
    assert all(row["score"] < 0 for row in rows)


@pytest.mark.parametrize(
    ("flags", "stops"),
    [
        ({"decoding": "free"}, True),
        ({"decoding": "free", "stop_after_answer": False}, False),
        ({"decoding": "free", "num_beams": 2}, False),  # whose search would compare other replies
        ({"decoding": "free", "num_beams": 2, "stop_after_answer": True}, True),
        ({"decoding": "span"}, False),
        ({"predictor": "server"}, False),
    ],
)
def test_when_replies_stop_after_the_answer(flags: Any, stops: bool) -> None:
    assert resolve_decoding(EvalArguments(**flags)).stop_after_answer is stops


def test_shuffled_sample_is_the_same_for_a_seed(run: Any) -> None:
    first = {row["id"] for row in run("--shuffle", "--num_samples=5", "--seed=1")}
    again = {row["id"] for row in run("--shuffle", "--num_samples=5", "--seed=1", "--overwrite")}
    other = {row["id"] for row in run("--shuffle", "--num_samples=5", "--seed=2", "--overwrite")}
    assert first == again != other


def test_multi_turn_feeds_the_replies_back(
    run: Any, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_squad.predictors.local.TURN_TOKENS", 6)
    rows = run("--prompt=multi_turn", "--num_samples=2")
    reader = Reader(f"{folder}/model", max_new_tokens=6)
    records = make_records(5, [2, 4], seed=3)[:2]
    for row, record in zip(rows, records, strict=True):
        replies = replies_in(row["Prompt"])
        assert len(replies) == 2
        assert any(replies)
        messages = build_messages(record, "multi_turn", answer=False)
        for turn, reply in zip((2, 4), replies, strict=True):  # behind the system prompt
            assert reply == reader.chat(messages[:turn])
            messages[turn]["content"] = reply


def test_adapter_brings_its_model_and_prompt(folder: Any, run: Any) -> None:
    rows = run(f"--adapter_name={folder}/adapter", "--num_samples=2", model=False)
    assert all("Only the text counts." in row["Prompt"] for row in rows)
    saved = json.loads(Path("results/results.csv.config.json").read_text())
    assert saved["model_name"] == str(folder / "model")


def test_interrupted_run_goes_on_with_the_same_rows(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run("--n_best=2")
    expected = Path("results/results.csv").read_bytes()
    answer, calls = LocalModel.answer, []

    def stops(self: Any, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(self, batch)

    monkeypatch.setattr(LocalModel, "answer", stops)
    with pytest.raises(KeyboardInterrupt):
        run("--n_best=2", "--overwrite")
    done = read_results("results/results.csv")
    assert 0 < len(done) < len(whole)
    run("--n_best=2")
    assert Path("results/results.csv").read_bytes() == expected
    assert f"{len(done)} questions are done" in capsys.readouterr().err
    Path("results/results.csv").write_bytes(expected[:-5])  # its last row is torn
    run("--n_best=2")
    assert Path("results/results.csv").read_bytes() == expected
    assert "of them again, as batches are run whole." in capsys.readouterr().err
    with pytest.raises(SystemExit, match="other settings.*num_beams"):
        run("--n_best=2", "--num_beams=3")


def command(folder: Any, output: Any, *launcher: str) -> Any:
    return [*(launcher or (PYTHON,)), str(evaluation_script()), f"--model_name={folder}/model",
            f"--dataset_name={folder}/data", f"--output={output}", *SMALL]  # fmt: skip


def evaluation_script() -> Any:
    return os.path.abspath(test_llama_squad.__file__)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return what starts a process of the stage, by its flags: a fork of one that has its imports.

    Those take longer than all that a run of a tiny model does. None outlives the test.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["test_llama_squad", "llama_squad.thresholds", "llama_squad.predictors.local",
         "llama_squad.modeling", "llama_squad.report", "llama_squad.summary",
         "transformers.models.llama.modeling_llama"]
    )  # fmt: skip
    started = []

    def start(folder: Any, output: Path, *more: str) -> Any:
        flags = [*command(folder, output)[2:], *more]
        started.append(context.Process(target=test_llama_squad.main, args=(flags,)))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.mark.slow
def test_killed_and_on_two_processes_the_file_is_the_same(
    folder: Any, tmp_path: Path, forked: Any
) -> None:
    """Kill -9 in the middle, go on with two processes, compare with an undisturbed run."""
    output = tmp_path / "killed.csv"
    process = forked(folder, output)
    while process.is_alive() and rows_of(output) < 4:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it ended before it could be killed"
    questions = len(make_records(5, [2, 4], seed=3))
    assert 4 <= rows_of(output) < questions
    with output.open("ab") as file:  # as if the kill had torn a row
        file.write(b'"3-4-1","Title')
    launcher = (PYTHON, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    done = subprocess.run(
        command(folder, output, *launcher), env=ENVIRONMENT, cwd=tmp_path, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "killed.csv", "killed.csv.config.json"
    ]  # fmt: skip
    whole = tmp_path / "whole.csv"
    last = forked(folder, whole)
    last.join()
    assert last.exitcode == 0
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_files_are_the_same(
    folder: Any, tmp_path: Path, forked: Any
) -> None:
    """Kill -9 at any moment of a start, then ten times soon after new rows; go on to the end."""
    many = make_records(17, [2, 3], seed=4)
    splits = {"train": make_records(2, [1], seed=1), "val": make_records(2, [1], seed=2)}
    write_dataset(
        splits | {"test": many}, CreateArguments(dataset_name=str(tmp_path / "data"))
    )  # fmt: skip
    more = [f"--dataset_name={tmp_path}/data", "--batch_size=3", "--n_best=3", "--num_beams=3"]
    output, moments = tmp_path / "killed.csv", random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(
            [*command(folder, output), *more], env=ENVIRONMENT, cwd=tmp_path,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(moments.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        process.wait()
    seen = []
    for _ in range(10):
        seen.append(rows_of(output))
        fork = forked(folder, output, *more)
        while fork.is_alive() and rows_of(output) <= seen[-1]:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.03))
        assert fork.is_alive(), "it ended before it could be killed"
        fork.kill()
        fork.join()
    assert seen == sorted(set(seen)), "each run went on where the last one had stopped"
    whole = tmp_path / "whole.csv"
    for path in (output, whole):
        last = forked(folder, path, *more)
        last.join()
        assert last.exitcode == 0
    assert rows_of(output) == len(many)
    assert output.read_bytes() == whole.read_bytes()


def rows_of(path: Path) -> Any:
    try:
        with path.open(newline="") as file:
            return sum(1 for _ in csv.reader(file)) - 1
    except (OSError, UnicodeDecodeError):
        return 0


@pytest.fixture
def adapter(folder: Any, tmp_path: Path) -> Any:
    """A copy of the adapter, to keep a threshold in."""
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def test_threshold_is_tuned_on_validation_and_used_afterwards(
    adapter: Any, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (f"--adapter_name={adapter}",)
    rows = run(*flags, "--tune_threshold", model=False)
    saved = json.loads((adapter / THRESHOLD_FILE).read_text())
    judged = read_results("results/results.csv.val.csv")
    validation = {record["id"] for record in make_records(3, [4], seed=2)}
    assert {row["id"] for row in judged} == validation  # and never on the test split
    assert "no_answer" not in {row["state"] for row in judged}
    threshold, figures = saved["na_prob_thresh"], summarize(judged)
    assert saved["exact"] == figures["best_exact"]
    tuned = summarize(rethreshold(row, threshold) for row in judged)
    assert tuned["exact"] == figures["best_exact"]
    assert saved["questions"] == len(validation)
    assert saved["tuned_for"]["num_beams"] == 4
    assert f"Threshold {threshold:.4f}" in capsys.readouterr().out
    assert all((row["state"] == "no_answer") == (row["na_prob"] > threshold) for row in rows)
    run(*flags, "--output=later/results.csv", model=False)
    assert load_yaml(Path("later/results.csv.config.json"))["na_prob_thresh"] == threshold


def test_a_threshold_that_was_tuned_for_other_settings_is_not_used(
    adapter: Any, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (f"--adapter_name={adapter}", "--num_samples=2")
    run(flags[0], "--tune_threshold", model=False)
    path = adapter / THRESHOLD_FILE
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"na_prob_thresh": 0.123}))

    def used(*more: Any) -> Any:
        run(*flags, "--overwrite", *more, model=False)
        threshold = load_yaml(Path("results/results.csv.config.json"))["na_prob_thresh"]
        return threshold, capsys.readouterr().err

    capsys.readouterr()
    assert used()[0] == 0.123
    threshold, said = used("--num_beams=2")
    assert threshold == 0.5
    assert "tuned for other settings (num_beams: 4 in the file, 2 now): 0.5 is used" in said
    assert used("--num_beams=2", "--na_prob_thresh=0.7")[0] == 0.7
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v + 0.1 for k, v in weights.items()}, adapter / "adapter_model.safetensors")
    threshold, said = used()
    assert (threshold, "adapter_digest" in said) == (0.5, True)
    path.write_text('{"na_prob_thresh": 0.123}')  # of an earlier version
    threshold, said = used()
    assert (threshold, "does not say what it was tuned for" in said) == (0.5, True)


def test_tuning_takes_the_sample_and_goes_on_with_its_own_file(
    adapter: Any, run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (f"--adapter_name={adapter}", "--tune_threshold", "--num_samples=3")
    run(*flags, model=False)
    judged = Path("results/results.csv.val.csv")
    assert len(read_results(judged)) == 3
    before = judged.read_bytes()
    # Another number of spans, of another file: the validation answers do not change.
    run(*flags, "--n_best=2", "--overwrite", model=False)
    answered: list[Any] = []
    answer = LocalModel.answer

    def watched(self: Any, batch: Any) -> Any:
        answered.extend(batch)
        return answer(self, batch)

    monkeypatch.setattr(LocalModel, "answer", watched)
    Path("results/results.csv").unlink()
    run(*flags, "--n_best=3", "--tune_for=f1", model=False)
    assert judged.read_bytes() == before
    assert {record["id"][0] for group in answered for record in group} == {"3"}, "test's alone"
    assert "% f1 on 3 validation questions" in capsys.readouterr().out


def test_a_threshold_of_a_sample_serves_its_own_run_alone(
    adapter: Any, run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = thresholds.Plateau(0.123, 50.0, 0.1, 0.2)
    monkeypatch.setattr(thresholds, "choose_threshold", lambda *_: chosen)
    flags = (f"--adapter_name={adapter}", "--tune_threshold", "--overwrite")

    def used(*more: str) -> Any:
        run(*flags, *more, model=False)
        return load_yaml(Path("results/results.csv.config.json"))["na_prob_thresh"]

    assert used("--num_samples=3") == 0.123
    assert not (adapter / THRESHOLD_FILE).exists()
    assert "a sample of 12: for this run alone" in capsys.readouterr().out
    assert used("--num_samples=100", "--tune_for=f1") == 0.123  # which all of them are
    kept = (adapter / THRESHOLD_FILE).read_text()
    saved = json.loads(kept)
    assert (saved["tune_for"], saved["questions"], "f1" in saved) == ("f1", 12, True)
    assert "a sample" not in capsys.readouterr().out
    used("--num_samples=3")
    assert (adapter / THRESHOLD_FILE).read_text() == kept


def test_na_prob_is_calibrated_with_its_threshold(
    adapter: Any, run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fitted to the validation answers as they were, and used by all that read the adapter."""
    fitted: list[Any] = []

    def fit(odds: Any, without: Any) -> Calibration:
        fitted.append((odds, without))
        return Calibration(0.25, -0.5)

    monkeypatch.setattr(thresholds, "fit_calibration", fit)
    flags = (f"--adapter_name={adapter}",)
    plain = run(*flags, model=False)
    again = (*flags, "--overwrite")
    run(*again, "--tune_threshold", "--calibrate", model=False)
    judged = read_results("results/results.csv.val.csv")
    apart = [row["no_answer_log_prob"] - row["best_span_log_prob"] for row in judged]
    assert fitted == [(apart, [not row["answers"] for row in judged])]
    assert [row["na_prob"] for row in judged] == pytest.approx([sigmoid(x) for x in apart])
    saved = json.loads((adapter / THRESHOLD_FILE).read_text())
    assert saved["calibration"] == {"scale": 0.25, "shift": -0.5}
    assert "na_prob's calibration error there:" in capsys.readouterr().out

    rows, config = run(*again, model=False), Path("results/results.csv.config.json")
    assert load_yaml(config)["calibration"] == saved["calibration"]
    for row, before in zip(rows, plain, strict=True):
        odds = row["no_answer_log_prob"] - row["best_span_log_prob"]
        assert row["na_prob"] == pytest.approx(sigmoid(0.25 * odds - 0.5))
        assert row["best_span"] == before["best_span"]
        assert (row["state"] == "no_answer") == (row["na_prob"] > saved["na_prob_thresh"])
    reader = Reader(str(adapter), num_beams=4)
    records = {record["id"]: record for record in make_records(5, [2, 4], seed=3)}
    asked = [[records[row["id"]][name] for row in rows] for name in ("question", "context")]
    assert [reading.na_prob for reading in reader(*asked)] == pytest.approx(
        [row["na_prob"] for row in rows], abs=1e-4
    )
    run(*again, "--na_prob_thresh=0.9", model=False)  # of what is calibrated
    given = load_yaml(config)
    assert (given["na_prob_thresh"], given["calibration"]) == (0.9, saved["calibration"])
    run(*again, "--tune_threshold", "--calibrate", "--no_answer_share=0.5", model=False)
    moved = json.loads((adapter / THRESHOLD_FILE).read_text())
    share = sum(fitted[0][1]) / len(judged)
    assert moved["no_answer_share"] == 0.5
    assert moved["calibration"]["shift"] == pytest.approx(-0.5 - math.log(share / (1 - share)))
    run(*again, "--tune_threshold", model=False)
    assert "calibration" not in json.loads((adapter / THRESHOLD_FILE).read_text())


def test_the_same_weights_may_be_named_otherwise(adapter: Any, run: Any, tmp_path: Path) -> None:
    """With a slash at the end, or by a link; a copy may have been changed."""
    run("--num_samples=2", f"--adapter_name={adapter}")
    (tmp_path / "link").symlink_to(adapter)
    run("--num_samples=2", f"--adapter_name={tmp_path}/link/", model=False)
    shutil.copytree(adapter, tmp_path / "copy")
    with pytest.raises(SystemExit, match="other settings .adapter_name"):
        run("--num_samples=2", f"--adapter_name={tmp_path}/copy", model=False)


def store(adapter: Any, run: Any, **changes: Any) -> None:
    """Change what is kept with the adapter, once a threshold is tuned."""
    path = adapter / THRESHOLD_FILE
    if not path.exists():
        run(f"--adapter_name={adapter}", "--tune_threshold", model=False)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_rows_of_another_calibration_are_not_gone_on_with(adapter: Any, run: Any) -> None:
    store(adapter, run, calibration={"scale": 0.5, "shift": 1.0})
    now = r"calibration: '\(absent\)' in the file, {'scale': 0.5, 'shift': 1.0} now"
    with pytest.raises(SystemExit, match=f"made with other settings .*{now}.*--overwrite"):
        run(f"--adapter_name={adapter}", model=False)


@pytest.mark.parametrize("spoiled", [False, True])
def test_a_file_that_cannot_be_gone_on_with_is_refused_before_a_model_is_loaded(
    spoiled: bool, folder: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("--num_samples=2")
    if spoiled:
        Path("results/results.csv").write_text("mine\n" * 1000)
    before = Path("results/results.csv").read_bytes()
    monkeypatch.setattr(modeling, "load_model", lambda *_: pytest.fail("a model was loaded"))
    what = "no result file of this program" if spoiled else "other settings.*num_beams"
    for tuned in ([], ["--tune_threshold", f"--adapter_name={folder}/adapter"]):
        with pytest.raises(SystemExit, match=what):
            run("--num_samples=2", "--num_beams=3", *tuned)
    assert Path("results/results.csv").read_bytes() == before


def test_a_threshold_of_a_calibrated_na_prob_is_not_kept_for_a_raw_one(
    adapter: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    present: list[float] = []

    def choose(curve: Any, given: float) -> thresholds.Plateau:
        present.append(given)
        return thresholds.Plateau(0.25, 50.0, 0.1, 0.2)

    store(adapter, run, calibration={"scale": 0.5, "shift": 1.0}, na_prob_thresh=0.75)
    monkeypatch.setattr(thresholds, "choose_threshold", choose)
    monkeypatch.setattr(thresholds, "fit_calibration", lambda *_: Calibration(0.5, 1.0))
    flags = (f"--adapter_name={adapter}", "--tune_threshold", "--num_samples=3", "--overwrite")
    run(*flags, "--calibrate", model=False)
    run(*flags, model=False)
    assert present == [0.75, 0.5]


@pytest.mark.parametrize("calibration", [{"scale": "0.5"}, {"shift": math.nan}, None])
def test_a_damaged_calibration_is_named_and_can_be_tuned_anew(
    adapter: Any, run: Any, calibration: Any
) -> None:
    store(adapter, run, calibration=calibration)
    with pytest.raises(SystemExit, match="na_prob_thresh.json is damaged .*or tune again"):
        run(f"--adapter_name={adapter}", model=False)
    run(f"--adapter_name={adapter}", "--tune_threshold", model=False)
    run(f"--adapter_name={adapter}", model=False)


FAILS = ("--tune_threshold", "--calibrate", "--num_samples=1")
"""One question is of one kind."""


def test_a_calibration_that_fails_says_why(adapter: Any, run: Any) -> None:
    with pytest.raises(SystemExit, match="--calibrate cannot fit na_prob .* all of one kind"):
        run(f"--adapter_name={adapter}", *FAILS, model=False)


@pytest.mark.slow
def test_a_calibration_that_fails_ends_all_processes_alike(
    folder: Any, adapter: Any, tmp_path: Path
) -> None:
    launcher = (PYTHON, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    flags = [f"--adapter_name={adapter}", f"--dataset_name={folder}/data", *FAILS, *SMALL]
    done = subprocess.run(
        [*launcher, str(evaluation_script()), *flags, f"--output={tmp_path}/results.csv"],
        env=ENVIRONMENT, cwd=tmp_path, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr.count("test_llama_squad.py: --calibrate cannot fit na_prob") == 2


def test_any_file_can_be_thresholded_anew(run: Any) -> None:
    """As if another threshold had been given, row by row; best_exact knows no threshold."""
    by_threshold = {
        threshold: run(f"--na_prob_thresh={threshold}", "--overwrite")
        for threshold in (0.0, 0.5, 1.0)
    }
    middle = sorted(row["na_prob"] for row in by_threshold[0.5])[7]
    by_threshold[middle] = run(f"--na_prob_thresh={middle}", "--overwrite")
    states = {row["state"] for row in by_threshold[middle]}
    assert states == {"answer", "no_answer"}
    for rows in by_threshold.values():
        for threshold, expected in by_threshold.items():
            assert [rethreshold(row, threshold) for row in rows] == expected
    figures = [summarize(rows) for rows in by_threshold.values()]
    best = [(f["best_exact"], f["best_exact_thresh"], f["best_f1"]) for f in figures]
    assert len(set(best)) == 1
    assert len({f["NoAns_exact"] for f in figures}) > 1


def with_best(prediction: Prediction, text: str, gap: float) -> Prediction:
    """Return a prediction whose best span is another, which is likelier by ``gap`` nats."""
    reply = prediction.reply
    assert reply.best
    span = Span(text, reply.best.score + gap)
    return replace(prediction, reply=replace(reply, best=span, proven_best=True))


@pytest.mark.parametrize(("gap", "counted"), [(0.0, "2 (100.0 %)"), (1.0, "0 (0.0 %)")])
def test_audit_from_the_command_line(
    folder: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    gap: Any,
    counted: Any,
) -> None:
    """The wide search finds another span that is as likely as ours, or one that is likelier."""
    make, answer, beams = LocalModel.__init__, LocalModel.answer, {}

    def made(self: Any, *args: Any, **options: Any) -> None:
        beams[self] = options["num_beams"]
        make(self, *args, **options | {"num_beams": 2})  # a thousand take long

    def scripted(self: Any, batch: Any) -> Any:
        predictions = answer(self, batch)
        wide = beams[self] != 2
        return [with_best(p, "other", gap) if wide else p for p in predictions]

    monkeypatch.setattr(LocalModel, "__init__", made)
    monkeypatch.setattr(LocalModel, "answer", scripted)
    flags = ["--num_samples=3", "--num_beams=2", "--questions=2", *SMALL]
    audit_main([f"--model_name={folder}/model", f"--dataset_name={folder}/data", *flags])
    assert {*beams.values()} == {2, AUDIT_BEAMS}
    out = capsys.readouterr().out
    assert f"Audit of 2 questions: the search found the best of all spans for {counted}." in out


def test_audit_of_a_search_that_is_wide_and_of_one_that_misses() -> None:
    """On contexts so short that a wide search proves its answer."""
    encoder = ChatEncoder(tiny_tokenizer())
    records = [
        {"id": str(n), "context": context, "question": "Who?", "answers": {"text": []}}
        for n, context in enumerate(["Ab c", "x y", "12 d"])
    ]

    class Misses(LocalModel):
        def answer(self, batch: Any) -> Any:
            return [with_best(prediction, "?!", -1.0) for prediction in super().answer(batch)]

    wide = LocalModel(tiny_model(), encoder, num_beams=1000)
    assert audit(wide, wide, records, 2) == Audit(3, 3, 0, LEAST_NOISE)
    misses = Misses(tiny_model(), encoder, num_beams=1000)
    assert audit(misses, wide, records, 2) == Audit(3, 0, 0, LEAST_NOISE)


def test_audit_counts() -> None:
    """Found by text, by an equal log-probability, both without a span; missed, and unproven."""
    span = Span
    pairs = [
        (span("a", -1.0), span("a", -1.0), True), (span("b", -1.0), span("c", -1.00001), True),
        (None, None, False), (span("d", -2.0), span("e", -1.0), True),
        (span("f", -2.0), span("g", -1.0), False),
    ]  # fmt: skip

    class Fake:
        def __init__(self, side: Any) -> None:
            self.side = side

        def answer(self, batch: Any) -> Any:
            return [
                Prediction(r, "", Reply("", [], 0.0, pairs[r["id"]][self.side],
                                        proven_best=pairs[r["id"]][2]))
                for group in batch for r in group
            ]  # fmt: skip

    records = [{"id": number, "context": str(number % 2)} for number in range(5)]
    found = audit(Fake(0), Fake(1), records, 3)
    assert (found.questions, found.best, found.unproven) == (5, 3, 1)
    assert "3 (60.0 %)" in str(found)


def test_other_weights_or_questions_under_the_same_name_are_no_resumption(
    folder: Any, tmp_path: Path
) -> None:
    """A retrained adapter, or a dataset built anew, must not be given the old one's rows."""
    adapter = tmp_path / "adapter"
    shutil.copytree(folder / "adapter", adapter)
    flags = [f"--adapter_name={adapter}", f"--dataset_name={folder}/data",
             f"--output={tmp_path}/results.csv", *SMALL]  # fmt: skip
    test_llama_squad.main(flags)
    test_llama_squad.main(flags)  # the same: nothing to do
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v + 0.1 for k, v in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(SystemExit, match="adapter_digest"):
        test_llama_squad.main(flags)
    test_llama_squad.main([*flags, "--overwrite"])
    splits = {"train": make_records(2, [1], seed=1), "val": make_records(2, [1], seed=2),
              "test": make_records(5, [2, 4], seed=3)}  # fmt: skip
    splits["test"][0]["question"] += " And why?"
    write_dataset(splits, CreateArguments(dataset_name=str(tmp_path / "data")))
    with pytest.raises(SystemExit, match="questions_digest"):
        test_llama_squad.main([f"--adapter_name={adapter}", f"--dataset_name={tmp_path}/data",
                               *flags[2:]])  # fmt: skip


def test_files_of_others_are_left_alone(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that look a little like a process's shards are neither read nor removed."""
    monkeypatch.chdir(tmp_path)

    def run(output: Any, *flags: str) -> Any:
        test_llama_squad.main([f"--model_name={folder}/model", f"--dataset_name={folder}/data",
                               "--num_samples=3", f"--output={output}", *SMALL, *flags])  # fmt: skip
        return read_results(output)

    run("lora.rank64.csv")
    before = Path("lora.rank64.csv").read_bytes()
    Path(".lora.shards.csv").write_text("mine")
    run("lora.csv")
    run("lora.csv", "--overwrite")
    assert Path("lora.rank64.csv").read_bytes() == before
    assert Path(".lora.shards.csv").read_text() == "mine"
    assert len(run("run[1].csv")) == 3


# Without a model ---------------------------------------------------------------------------------


class Answers:
    """Answers all questions with their first word; ``watch`` sees each batch before it is."""

    def __init__(self, watch: Any = lambda batch: None, failing: Any = ()) -> None:
        self.watch, self.failing = watch, failing
        self.asked: list[str] = []

    def answer(self, batch: Any) -> Any:
        self.watch(batch)
        records = [record for group in batch for record in group]
        self.asked += [record["id"] for record in records]
        return [
            Prediction(r, "p", Reply("", [], None), "400: too long")
            if r["id"] in self.failing
            else Prediction(r, "p", Reply(format_answer(r["context"].split()[0]), [], -1.0))
            for r in records
        ]


class AnswersAlone(Answers):
    """The same, one question after the other, from the last to the first."""

    def answer_all(self, records: Any) -> Any:
        for record in reversed(records):
            yield self.answer([[record]])


RECORDS = make_records(6, [3], seed=5)


def evaluated(model: Any, path: Path, **options: Any) -> Any:
    evaluate(model, RECORDS, path, {"seed": 1}, batch_size=4, **options)
    return read_results(path)


def test_no_other_run_comes_between(tmp_path: Path) -> None:
    """From before the first answer to the last row, also while shards are gathered."""
    path = tmp_path / "results.csv"
    tried = []

    def second(batch: Any) -> None:
        with pytest.raises(ValueError, match="another process is writing"):
            evaluate(Answers(), RECORDS, path, {"seed": 1})
        tried.append(batch)

    evaluated(Answers(second), path, finish=lambda: second("the figures"))
    assert len(tried) == 7
    whole = path.read_bytes()
    rows = read_results(path)
    for shard, part in ((0, rows[3:9]), (1, rows[12:])):  # of a run that was killed
        with ResultsFile(tmp_path / f".results.csv.shard{shard}", {"seed": 1}) as file:
            file.append(part)
    path.unlink()
    model = Answers(second)
    evaluated(model, path)
    assert model.asked == [row["id"] for row in rows[:3] + rows[9:12]]
    assert path.read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.csv", "results.csv.config.json"]


def test_the_figures_are_those_of_a_file_that_no_other_run_can_change(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def report(args: Any) -> None:
        with (
            pytest.raises(ValueError, match="another process is writing"),
            ResultsFile(args.output, {}, overwrite=True),
        ):
            pass
        refused.append(args.output)

    monkeypatch.setattr(test_llama_squad, "report", report)
    run("--num_samples=2")
    assert refused == ["results/results.csv"]


@pytest.mark.parametrize("kind", ["lost", "doubled"])
def test_a_file_that_does_not_hold_each_question_once_gives_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / "results.csv"
    append = ResultsFile.append

    def damage(self: Any, rows: Any) -> None:
        append(self, rows)
        content = path.read_bytes()
        header = content.index(b"\n") + 1
        path.write_bytes(content[:header] if kind == "lost" else content + content[header:])

    evaluated(Answers(), path)
    whole = path.read_bytes()
    monkeypatch.setattr(ResultsFile, "append", damage)
    monkeypatch.setattr(ResultsFile, "gather", lambda self, shards, order: None)
    with pytest.raises(ValueError, match="should have one row for each of 18 questions"):
        evaluated(Answers(), path, overwrite=True)
    monkeypatch.undo()
    evaluated(Answers(), path)  # which is mended by the same command
    assert path.read_bytes() == whole


@pytest.mark.parametrize("kind", [Answers, AnswersAlone])
def test_failed_questions_are_kept_and_asked_again(tmp_path: Path, kind: type[Answers]) -> None:
    path, failing = tmp_path / "results.csv", [RECORDS[4]["id"], RECORDS[10]["id"]]
    first = evaluated(kind(failing=failing), path)
    assert [row["id"] for row in first] == [record["id"] for record in RECORDS]
    failed = [row for row in first if row["state"] == "failed"]
    assert [row["id"] for row in failed] == failing
    assert {row["completion"] for row in failed} == {"400: too long"}
    assert {(row["score"], row["na_prob"], row["Exact match"]) for row in failed} == {
        (None, None, False)
    }
    again = kind(failing=failing[1:])
    second = evaluated(again, path)
    assert [row["id"] for row in second if row["state"] == "failed"] == failing[1:]
    if kind is AnswersAlone:
        assert sorted(again.asked) == failing
    third = evaluated(kind(), path)
    assert {row["state"] for row in third} == {"answer"}
    whole = evaluated(kind(), tmp_path / "whole.csv")
    assert third == whole


def test_pairs_of_simultaneous_starts(tmp_path: Path) -> None:
    """Each ends complete or is refused; see benchmarks/simultaneous_starts.py for 200."""
    import simultaneous_starts  # in a folder that ``helpers`` adds to the path

    counts = simultaneous_starts.run_pairs(6, tmp_path, questions=60, seed=1)
    assert sum(counts.values()) == 6
    assert counts["refused"] > 0


def test_what_cannot_be_written_is_said_before_a_model_is_loaded(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> Never:
        raise AssertionError("loaded")

    monkeypatch.setattr(test_llama_squad, "load_predictor", load)
    Path("taken.csv").mkdir()
    Path("file").touch()
    for flags, message in [
        (["--output=taken.csv"], "cannot write taken.csv: it is no regular file"),
        (["--output=file/results.csv"], "cannot write file/results.csv: "),
        (["--predictions_dir=file"], "cannot write file/predictions.json: "),
    ]:
        with pytest.raises(SystemExit) as error:
            run(*flags)
        assert message in str(error.value.code)
        assert "\n" not in str(error.value.code)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name=nowhere"], "no dataset in 'nowhere'.*create_squad_dataset.py"),
        (["--adapter_name=./nowhere"], "train"),
        (["--split=val", "--decoding=free", "--n_best=2"], "--n_best needs --decoding span"),
        (["--tune_threshold", "--na_prob_thresh=0.3"], "give one of them"),
        (["--tune_threshold"], "local --adapter_name"),
        (["--no_answer_share=0.5"], "what --tune_threshold is to expect"),
        (["--tune_threshold", "--no_answer_share=1.0"], "between 0 and 1"),
        (["--calibrate"], "moves na_prob, and so its threshold"),
        (["--calibrate", "--decoding=free"], "--calibrate needs --decoding span"),
        (["--calibrate", "--predictor=encoder"], "--calibrate means nothing to --predictor encode"),
        (["--calibrate", "--predictor=server"], "--calibrate means nothing to --predictor server"),
        (["--tune_for=f1"], "--tune_for says what --tune_threshold tunes for"),
        (["--num_beams=0"], "at least 1"),
        (["--stop_after_answer"], "--stop_after_answer needs --decoding free"),
        (["--predictor=server", "--stop_after_answer"], "means nothing to --predictor server"),
    ],
)
def test_mistakes_are_explained(
    run: Any, flags: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        run(*flags)
    said = str(error.value.code) + capsys.readouterr().err
    import re

    assert re.search(message, said), said
