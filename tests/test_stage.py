"""What the stages share: Ctrl-C, progress in a pipe, checks that come first, the next command."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import make_records, tiny_model, tiny_tokenizer
from test_flags import loaded, run

import create_squad_dataset
from llama_squad.arguments import CreateArguments, EvalArguments
from llama_squad.data import load_squad, write_dataset
from llama_squad.evaluation import choose_records
from llama_squad.folders import is_hub_name
from llama_squad.stage import if_interrupted, next_command

# A stage as the scripts are, whose work is a line of its own.
STAGE = """
import sys, threading, time
sys.path.insert(0, {root!r})
from llama_squad.stage import if_interrupted, run_stage

def main():
    {work}

if __name__ == "__main__":
    run_stage(main)
"""


def start(tmp_path: Path, work: str) -> subprocess.Popen[str]:
    script = tmp_path / "stage.py"
    script.write_text(STAGE.format(root=str(ROOT), work=work.replace("\n", "\n    ")))
    return subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip


def interrupt(process: subprocess.Popen[str]) -> str:
    """Send Ctrl-C once the process has said "ready"; return its errors."""
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    return errors


@pytest.mark.parametrize(
    "work",
    [
        "print('ready', flush=True); time.sleep(60)",
        # another thread that never ends, and is no daemon
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "print('ready', flush=True); time.sleep(60)",
        # a library that turns the interrupt into an error of its own
        "try:\n    print('ready', flush=True); time.sleep(60)\n"
        "except BaseException: raise SystemError('import failed') from None",
        # one that takes it for a normal end
        "try:\n    print('ready', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: pass",
    ],
)
def test_ctrl_c_ends_in_one_line(tmp_path: Path, work: str) -> None:
    errors = interrupt(start(tmp_path, work))
    assert errors == ("stage.py: interrupted: nothing was written: the same command starts anew.\n")


def test_ctrl_c_says_what_is_kept(tmp_path: Path) -> None:
    work = (
        "with if_interrupted('outer'), if_interrupted(lambda: 'rows are kept'):\n"
        "    print('ready', flush=True); time.sleep(60)"
    )
    assert interrupt(start(tmp_path, work)) == "stage.py: interrupted: rows are kept.\n"


def test_ctrl_c_at_the_very_end(tmp_path: Path) -> None:
    """While the interpreter shuts down the work is done: that is no interrupt, and no kill.

    What sends the signal is freed after Python has given up the handlers of signals.
    """
    work = """import builtins, os, signal
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), interrupt=signal.SIGINT):
        kill(pid, interrupt)
builtins.late = Late()"""
    process = start(tmp_path, work)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors == ""


@pytest.mark.parametrize("block", ["", "with if_interrupted('kept'):\n    "])
def test_ctrl_c_while_torch_is_imported(block: str, tmp_path: Path) -> None:
    """Its C++ aborts at an exception from Python: the process ends before there is one."""
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import os, time\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(30)\n"
        "except KeyboardInterrupt:\n"
        "    os.abort()\n"
    )
    errors = interrupt(start(tmp_path, f"{block}import torch"))
    kept = "kept" if block else "nothing was written: the same command starts anew"
    assert errors == f"stage.py: interrupted: {kept}.\n"


def test_other_errors_pass(tmp_path: Path) -> None:
    process = start(tmp_path, "sys.exit('a message')")
    assert process.communicate()[1] == "a message\n"
    assert process.returncode == 1


def test_the_innermost_block_counts() -> None:
    with (
        pytest.raises(KeyboardInterrupt, match="inner"),
        if_interrupted("outer"),
        if_interrupted("inner"),
    ):
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stages")
    tiny_model().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    splits = {
        "train": make_records(4, [2], seed=1),
        "val": make_records(2, [2], seed=2),
        "test": make_records(40, [2, 4], seed=3),
    }
    write_dataset(splits, CreateArguments(dataset_name=str(root / "data")))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.8, 2.0, None])
def test_ctrl_c_in_an_evaluation(folder: Path, tmp_path: Path, seconds: float | None) -> None:
    """While it imports, loads or answers: one line, whatever the moment.

    Seconds are from the start; None: once the first rows are written, with most still to come.
    """
    rows = tmp_path / "rows.csv"
    argv = [f"--model_name={folder}/model", f"--dataset_name={folder}/data", "--batch_size=2"]
    argv += [f"--output={rows}"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "test_llama_squad.py", *argv], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if seconds is None:
        until = time.monotonic() + 120
        while not rows.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
    else:
        time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130, errors
    last = errors.splitlines()[-1]
    assert last.startswith("test_llama_squad.py: interrupted: ")
    assert "Traceback" not in errors


def test_progress_in_a_pipe_is_lines(tmp_path: Path) -> None:
    """Of our own bars and the libraries', which take theirs from tqdm.auto."""
    work = (
        "import llama_squad.stage\n"
        "llama_squad.stage.LINE_INTERVAL_S = 0.2\n"
        "from tqdm import tqdm\n"
        "from tqdm.auto import tqdm as library\n"
        "for bar in (tqdm, library):\n"
        "    for _ in bar(range(20), desc='Work'): time.sleep(0.05)\n"
        "with tqdm(total=3, desc='Short') as short: short.update(3)\n"
        "bar = library(total=2, dynamic_ncols=True)\n"
        "bar.write('a log line'); bar.set_postfix(loss=1); bar.close()"
    )
    process = start(tmp_path, work)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert said == "a log line\n"
    assert "\r" not in errors and "Short" not in errors
    lines = errors.splitlines()
    assert 4 <= len(lines) <= 14
    assert all(re.match(r"Work: +\d+% \d+/20 \[", line) for line in lines), lines
    assert sum("100% 20/20" in line for line in lines) == 2


def test_warnings_that_nobody_can_act_on_are_silent(tmp_path: Path) -> None:
    work = (
        "import logging\n"
        "for name in ('bitsandbytes.backends.cpu.ops', 'transformers.trainer_utils'):\n"
        "    for text in ('Failed to load CPU gemm_4bit_forward',"
        " 'The tokenizer has new PAD/BOS/EOS tokens', f'{name} has more to say'):\n"
        "        logging.getLogger(name).warning(text)"
    )
    errors = start(tmp_path, work).communicate(timeout=60)[1]
    said = errors.splitlines()
    assert "bitsandbytes.backends.cpu.ops has more to say" in said
    assert "transformers.trainer_utils has more to say" in said
    assert len(said) == 4, "each knows its own warning only"


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("gpt2", True),
        ("meta-llama/Llama-2-7b-chat-hf", True),
        ("results/final_checkpoints", False),
        ("results", False),
        ("data/squad_v2", False),
        ("./model", False),
        ("../model", False),
        ("/models/llama", False),
        ("~/model", False),
        ("my/own/model", False),
        ("", False),
    ],
)
def test_names_on_the_hub(
    name: str, is_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(name) is is_one
    if is_one:
        Path(name).mkdir(parents=True)
        assert not is_hub_name(name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("test_llama_squad.py", "no dataset in 'data/squad_v2': make it with `python create_squ"),
        ("train_llama_squad.py", "no dataset in 'data/squad_v2': make it with `python create_squ"),
        ("train_llama_squad.py --dataset_name=DATA --model_name=results/x", "no folder results/x"),
        ("train_llama_squad.py --dataset_name=DATA --chat_template=x.j", "no file x.j here"),
        ("test_llama_squad.py --dataset_name=DATA --adapter_name=results/x", "no folder results/x"),
        ("test_llama_squad.py --dataset_name=DATA --adapter_name=DATA", "holds neither"),
        ("test_llama_squad.py --reasoning_tokens=-1", "--reasoning_tokens must not be negative"),
        ("test_llama_squad.py --sample=paragraphs", "give their number"),
        ("app.py --adapter_name=results/final_checkpoints", "no folder results/final_checkpoints"),
        ("app.py --max_new_tokens=0", "--max_new_tokens must be at least 1, not 0"),
    ],
)
def test_mistakes_are_told_before_anything_slow_is_loaded(
    line: str, message: str, folder: Path, tmp_path: Path
) -> None:
    done = run(tmp_path, *shlex.split(line.replace("DATA", str(folder / "data"))))
    assert message in done.stderr
    assert done.returncode in (1, 2)
    assert not loaded(done)
    assert len(done.stderr.splitlines()) == 2, done.stderr  # and the list of modules


# The next command -------------------------------------------------------------------------------


def test_the_next_command_holds_what_the_stage_would_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert next_command("train", [], dataset_name="data/squad_v2") == "python train_llama_squad.py"
    Path("c.yaml").write_text("dataset_name: d\ntrain: {weight_decay: 0.1}\n")
    argv = ["--config", "c.yaml"]
    known = next_command("train", argv, dataset_name="d")
    assert known == "python train_llama_squad.py --config c.yaml"
    other = next_command("test", argv, adapter_name="my results/x", dataset_name="e")
    assert shlex.split(other)[2:] == [
        "--config", "c.yaml", "--adapter_name=my results/x", "--dataset_name=e",
    ]  # fmt: skip
    Path("config.yaml").write_text("dataset_name: d\n")  # found without a flag
    assert next_command("train", [], dataset_name="d") == "python train_llama_squad.py"
    line = next_command("summarize", ["--config=c.yaml"], "a b.csv")
    assert line == "python summarize_results.py 'a b.csv' --config c.yaml"


@pytest.mark.slow
def test_each_printed_command_works_as_printed(folder: Path, tmp_path: Path) -> None:
    """From the dataset to the table, by nothing but the commands that the stages print."""
    for split in ("train", "test"):
        articles = []
        for n in range(4):
            answer = {"text": "Rome", "answer_start": 16}
            qa = {"id": f"{split}{n}", "question": "Where?", "answers": [answer]}
            paragraph = {"context": f"Anna {n} lives in Rome.", "qas": [qa]}
            articles.append({"title": f"T{n}", "paragraphs": [paragraph]})
        (tmp_path / f"{split}.json").write_text(json.dumps({"data": articles}))
    (tmp_path / "my config.yaml").write_text(
        f"model_name: {folder}/model\n"
        "create: {train_files: [train.json], test_files: [test.json], validation_ratio: 0}\n"
        "train: {max_steps: 1, quantize: false, output_dir: my results, report_to: none,\n"
        "  save_strategy: no, lora_r: 2}\n"
        "test: {max_new_tokens: 8, output: my results/r.csv}\n"
    )
    line = "python create_squad_dataset.py --config 'my config.yaml' --dataset_name 'my data'"
    ran = []
    while line:
        _, script, *argv = shlex.split(line)
        done = subprocess.run(
            [sys.executable, ROOT / script, *argv], cwd=tmp_path, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        ran.append(script)
        line = "".join(re.findall(r"Next: (.*)", done.stdout))
    assert ran == [
        "create_squad_dataset.py",
        "train_llama_squad.py",
        "test_llama_squad.py",
        "summarize_results.py",
    ]
    assert "Correct" in done.stdout


def test_a_dataset_without_training_questions_is_tested_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = ROOT / "quickstart" / "data" / "test.json"
    create_squad_dataset.main(["--test_files", str(file), "--dataset_name=d"])
    assert "Next: python test_llama_squad.py --dataset_name=d\n" in capsys.readouterr().out


# Samples ----------------------------------------------------------------------------------------


def test_a_sample_in_whole_paragraphs(folder: Path) -> None:
    split = load_squad(str(folder / "data"))["test"]
    sizes: dict[str, int] = {}
    for context in split["context"]:
        sizes[context] = sizes.get(context, 0) + 1
    args = EvalArguments(num_samples=20, sample="paragraphs", seed=1)
    records = choose_records(split, args)
    assert 20 <= len(records) <= 23
    held = [record["context"] for record in records]
    assert all(held.count(context) == sizes[context] for context in held)
    ids = [record["id"] for record in records]
    assert ids != split["id"][: len(ids)], "they are the first ones"
    again = choose_records(split, args)
    assert [record["id"] for record in again] == ids
    plain = choose_records(split, EvalArguments(num_samples=20))
    assert [record["id"] for record in plain] == split["id"][:20]
