"""test_llama_squad.py on a small dataset with a tiny model of random weights."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import make_records, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

import test_llama_squad
from llama_squad import evaluation
from llama_squad.answers import NO_ANSWER
from llama_squad.collator import ConversationEncoder
from llama_squad.config import CreateArguments, TestArguments, load_yaml, save_run_config
from llama_squad.data import write_dataset
from llama_squad.generation import Reply, Span
from llama_squad.predictors import LocalModel, Prediction
from llama_squad.results import read_results, summarize
from llama_squad.spans import is_span

PYTHON = sys.executable


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a LoRA adapter of it, and a dataset of 15 test questions on 5 paragraphs."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("stage")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    for path in (root / "model", root / "adapter"):
        tokenizer.save_pretrained(path)
    model.save_pretrained(root / "model")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    adapted.peft_config["default"].base_model_name_or_path = str(root / "model")
    adapted.save_pretrained(root / "adapter")
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
def run(folder, tmp_path, monkeypatch):
    """Run the stage; returns the rows."""
    monkeypatch.chdir(tmp_path)

    def stage(*flags, model=True):
        which = [f"--model_name={folder}/model"] if model else []
        test_llama_squad.main([*which, f"--dataset_name={folder}/data", *SMALL, *flags])
        return read_results("results/results.csv")

    return stage


SMALL = ("--batch_size=4", "--max_new_tokens=12")


def test_rows_hold_spans_or_abstain(run, capsys):
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
    lines = [
        json.loads(line) for line in Path("results/results.n_best.jsonl").read_text().splitlines()
    ]
    assert [line["id"] for line in lines] == list(contexts)
    for line in lines:
        total = line["no_answer"]["probability"] + sum(s["probability"] for s in line["spans"])
        assert total == pytest.approx(1)
        assert len({span["text"] for span in line["spans"]}) == 2
    assert json.loads(Path("official/na_prob.json").read_text()) == {
        row["id"]: row["na_prob"] for row in rows
    }
    out = capsys.readouterr()
    assert "% Exact Match" in out.out
    assert "Next: python summarize_results.py results/results.csv" in out.out
    assert out.err.count("running on the CPU") <= 1


def test_free_decoding_writes_what_the_model_says(run):
    rows = run("--decoding=free", "--num_samples=5")
    assert len(rows) == 5
    assert {row["na_prob"] for row in rows} == {None}
    assert all(row["score"] < 0 for row in rows)


def test_shuffled_sample_is_the_same_for_a_seed(run):
    first = {row["id"] for row in run("--shuffle", "--num_samples=5", "--seed=1")}
    again = {row["id"] for row in run("--shuffle", "--num_samples=5", "--seed=1", "--overwrite")}
    other = {row["id"] for row in run("--shuffle", "--num_samples=5", "--seed=2", "--overwrite")}
    assert first == again != other


def test_multi_turn_feeds_the_replies_back(run, monkeypatch):
    turns = []
    real = LocalModel._talk

    def watched(self, batch, conversations):
        real(self, batch, conversations)
        turns.extend(messages for group in conversations for messages in group)

    monkeypatch.setattr(LocalModel, "_talk", watched)
    monkeypatch.setattr("llama_squad.predictors.TURN_TOKENS", 6)
    rows = run("--prompt=multi_turn", "--num_samples=2")
    for row, messages in zip(rows, turns, strict=True):
        replies = [m["content"] for m in messages if m["role"] == "assistant"]
        assert len(replies) == 2
        assert any(replies)
        assert all(reply in row["Prompt"] for reply in replies)


def test_adapter_brings_its_model_and_prompt(folder, run):
    rows = run(f"--adapter_name={folder}/adapter", "--num_samples=2", model=False)
    assert all("Only the text counts." in row["Prompt"] for row in rows)
    saved = json.loads(Path("results/results.config.json").read_text())
    assert saved["model_name"] == str(folder / "model")


def test_interrupted_run_goes_on_with_the_same_rows(run, monkeypatch, capsys):
    whole = run("--n_best=2")
    expected = Path("results/results.csv").read_bytes()
    lines = Path("results/results.n_best.jsonl").read_text()
    answer, calls = LocalModel.answer, []

    def stops(self, batch):
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
    assert Path("results/results.n_best.jsonl").read_text() == lines
    assert f"{len(done)} questions are done" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="other settings.*num_beams"):
        run("--n_best=2", "--num_beams=3")


def command(folder, output, *launcher):
    return [*(launcher or (PYTHON,)), str(evaluation_script()), f"--model_name={folder}/model",
            f"--dataset_name={folder}/data", f"--output={output}", *SMALL]  # fmt: skip


def evaluation_script():
    return os.path.abspath(test_llama_squad.__file__)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_killed_and_on_two_processes_the_file_is_the_same(folder, tmp_path):
    """Kill -9 in the middle, go on with two processes, compare with an undisturbed run."""
    output = tmp_path / "killed.csv"
    process = subprocess.Popen(command(folder, output), env=ENVIRONMENT, cwd=tmp_path)
    while process.poll() is None and rows_of(output) < 4:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with output.open("ab") as file:  # as if the kill had torn a row
        file.write(b'"3-4-1","Title')
    launcher = (PYTHON, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    done = subprocess.run(
        command(folder, output, *launcher), env=ENVIRONMENT, cwd=tmp_path, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.config.json", "killed.csv"]
    whole = tmp_path / "whole.csv"
    subprocess.run(command(folder, whole), env=ENVIRONMENT, cwd=tmp_path, check=True)
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_files_are_the_same(folder, tmp_path):
    """Kill -9 at any moment of a start, then ten times soon after new rows; go on to the end."""
    many = make_records(24, [2, 3], seed=4)
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
        process = subprocess.Popen(
            [*command(folder, output), *more], env=ENVIRONMENT, cwd=tmp_path,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and rows_of(output) <= seen[-1]:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert seen == sorted(set(seen)), "each run went on where the last one had stopped"
    for path in (output, tmp_path / "whole.csv"):
        subprocess.run([*command(folder, path), *more], env=ENVIRONMENT, cwd=tmp_path, check=True)
    assert rows_of(output) == len(many)
    for suffix in (".csv", ".n_best.jsonl"):
        killed, whole = (tmp_path / (name + suffix) for name in ("killed", "whole"))
        assert killed.read_bytes() == whole.read_bytes()


def rows_of(path):
    try:
        with path.open(newline="") as file:
            return sum(1 for _ in csv.reader(file)) - 1
    except (OSError, UnicodeDecodeError):
        return 0


def test_threshold_is_tuned_on_validation_and_used_afterwards(folder, run, capsys):
    flags = (f"--adapter_name={folder}/adapter",)
    path = folder / "adapter" / evaluation.THRESHOLD_FILE
    try:
        rows = run(*flags, "--tune_threshold", model=False)
        saved = json.loads(path.read_text())
        judged = read_results("results/results.val.csv")
        validation = {record["id"] for record in make_records(3, [4], seed=2)}
        assert {row["id"] for row in judged} == validation  # and never on the test split
        assert "no_answer" not in {row["state"] for row in judged}
        threshold = saved["na_prob_thresh"]
        assert threshold == summarize(judged)["best_exact_thresh"]
        assert saved["questions"] == len(validation)
        assert f"Threshold {threshold:.4f}" in capsys.readouterr().out
        assert all((row["state"] == "no_answer") == (row["na_prob"] > threshold) for row in rows)
        run(*flags, "--output=later/results.csv", model=False)
        assert load_yaml_json("later/results.config.json")["na_prob_thresh"] == threshold
    finally:
        path.unlink(missing_ok=True)


def load_yaml_json(path):
    return load_yaml(Path(path))


@pytest.mark.parametrize(("gap", "counted"), [(0.0, "2 (100.0 %)"), (1.0, "0 (0.0 %)")])
def test_audit_from_the_command_line(run, capsys, monkeypatch, gap, counted):
    """The wide search finds another span that is as likely as ours, or one that is likelier."""
    answer, beams = LocalModel.answer, []

    def scripted(self, batch):
        generator = self._generator
        beams.append(generator.num_beams)
        generator.num_beams = 2  # a thousand take long
        predictions = answer(self, batch)
        generator.num_beams = beams[-1]
        if generator.num_beams == 2:
            return predictions
        spans = [Span("other", prediction.reply.best.log_prob + gap) for prediction in predictions]
        return [
            replace(prediction, reply=replace(prediction.reply, best=span, certain=True))
            for prediction, span in zip(predictions, spans, strict=True)
        ]

    monkeypatch.setattr(LocalModel, "answer", scripted)
    run("--num_samples=3", "--num_beams=2", "--audit=2")
    assert {*beams} == {2, evaluation.AUDIT_BEAMS}
    out = capsys.readouterr().out
    assert f"Audit of 2 questions: the search found the best of all spans for {counted}." in out


def test_audit_of_a_search_that_is_wide_and_of_one_that_misses():
    """On contexts so short that a wide search proves its answer."""
    encoder = ConversationEncoder(tiny_tokenizer())
    records = [
        {"id": str(n), "context": context, "question": "Who?", "answers": {"text": []}}
        for n, context in enumerate(["Ab c", "x y", "12 d"])
    ]

    class Misses(LocalModel):
        def answer(self, batch):
            found = super().answer(batch)
            return [
                replace(item, reply=replace(item.reply, best=Span("?!", item.reply.best.log_prob - 1)))
                for item in found
            ]  # fmt: skip

    wide = LocalModel(tiny_model(), encoder, num_beams=1000)
    args = TestArguments(audit=3, batch_size=2)
    assert evaluation.audit(wide, wide, records, args) == evaluation.Audit(3, 3, 0)
    misses = Misses(tiny_model(), encoder, num_beams=1000)
    assert evaluation.audit(misses, wide, records, args) == evaluation.Audit(3, 0, 0)


def test_audit_counts():
    """Found by text, by an equal log-probability, both without a span; missed, and unproven."""
    span = Span
    pairs = [
        (span("a", -1.0), span("a", -1.0), True), (span("b", -1.0), span("c", -1.00001), True),
        (None, None, False), (span("d", -2.0), span("e", -1.0), True),
        (span("f", -2.0), span("g", -1.0), False),
    ]  # fmt: skip

    class Fake:
        def __init__(self, side):
            self.side = side

        def answer(self, batch):
            return [
                Prediction(r, "", Reply("", [], 0.0, pairs[r["id"]][self.side],
                                        certain=pairs[r["id"]][2]))
                for group in batch for r in group
            ]  # fmt: skip

    records = [{"id": number, "context": str(number % 2)} for number in range(5)]
    args = TestArguments(audit=10, batch_size=3)
    found = evaluation.audit(Fake(0), Fake(1), records, args)
    assert (found.questions, found.best, found.unproven) == (5, 3, 1)
    assert "3 (60.0 %)" in str(found)


def test_other_weights_or_questions_under_the_same_name_are_no_resumption(folder, tmp_path):
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


def test_files_of_others_are_left_alone(folder, tmp_path, monkeypatch):
    """Files that look a little like a process's shards are neither read nor removed."""
    monkeypatch.chdir(tmp_path)

    def run(output, *flags):
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


def test_a_torn_line_of_spans_is_dropped(run):
    run("--num_samples=6", "--n_best=2")
    path = Path("results/results.n_best.jsonl")
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write('{"id": "1", "text": "é'.encode()[:-1])
    run("--num_samples=6", "--n_best=2")
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name=nowhere"], "no dataset in 'nowhere'.*create_squad_dataset.py"),
        (["--adapter_name=./nowhere"], "train"),
        (["--split=val", "--decoding=free", "--n_best=2"], "--n_best needs --decoding span"),
        (["--tune_threshold", "--na_prob_thresh=0.3"], "give one of them"),
        (["--tune_threshold"], "local --adapter_name"),
        (["--num_beams=0"], "at least 1"),
    ],
)
def test_mistakes_are_explained(run, flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        run(*flags)
    said = str(error.value.code) + capsys.readouterr().err
    import re

    assert re.search(message, said), said
