"""Every script of runs/ is run through, from dataset to table, with a tiny model.

The scripts call ``python STAGE.py …``. Here ``python`` is a stand-in on the PATH that hands its
arguments to this process, which adds the flags that make a run tiny and calls the stage's ``main``:
so nothing is imported twice, and everything else is as a user would run it.
"""

import importlib
import json
import math
import os
import shutil
import socketserver
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import forgetting
import pytest
import yaml
from conftest import ROOT
from helpers import make_records, model_folder

from llama_squad.training import chat_share

STAND_IN = """#!{python} -SE
import json, os, socket, sys
with socket.create_connection(("127.0.0.1", {port})) as server:
    server.sendall(json.dumps([os.getcwd(), sys.argv[1:]]).encode() + b"\\n")
    sys.exit(server.makefile().read() or None)
"""


def squad_file(path: Path, records: list[dict]) -> str:
    """Write records as an official SQuAD file."""
    articles: dict[str, dict[str, list]] = {}
    for record in records:
        answers = [
            {"text": text, "answer_start": start}
            for text, start in zip(*record["answers"].values(), strict=True)
        ]
        qa = {"id": record["id"], "question": record["question"], "answers": answers,
              "is_impossible": not answers}  # fmt: skip
        articles.setdefault(record["title"], {}).setdefault(record["context"], []).append(qa)
    data = [
        {"title": title, "paragraphs": [{"context": c, "qas": q} for c, q in contexts.items()]}
        for title, contexts in articles.items()
    ]
    path.write_text(json.dumps({"data": data}))
    return str(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The flags that make each stage tiny."""
    folder = tmp_path_factory.mktemp("tiny")
    train = squad_file(folder / "train.json", make_records(9, [3, 2], seed=1))
    for records in (make_records(2, [3], seed=2), make_records(16, [4], seed=2)):
        squad_file(folder / f"test_{len(records)}.json", records)
    model = ["--model_name", model_folder(folder)]
    return {
        "create_squad_dataset.py": ["--train_files", train, "--test_files"],  # see ``run``

        "train_llama_squad.py": [
            *model, "--max_steps", "3", "--no_quantize", "--bf16", "False",
            "--per_device_train_batch_size", "4", "--eval_samples", "4", "--eval_steps", "100",
            "--disable_tqdm", "True", "--report_to", "none",
        ],
        "test_llama_squad.py": [*model, "--max_new_tokens", "4", "--quantize", "False"],
        "summarize_results.py": [],
        "benchmarks/forgetting.py": [],
        "benchmarks/disfl_qa.py": [],
        "benchmarks/abstentions.py": [],
    }  # fmt: skip


@pytest.fixture
def run_script(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what runs a script of runs/ in a copy of the repository's top."""
    monkeypatch.setattr("llama_squad.training.setup.VALIDATION_TOKENS", 8)
    for name in ("runs", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for stage in tiny:
        shutil.copy(ROOT / stage, tmp_path)
    calls: list[list[str]] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            cwd, (stage, *argv) = json.loads(self.rfile.readline())
            calls.append([stage, *argv])
            monkeypatch.chdir(cwd)
            try:
                importlib.import_module(Path(stage).stem).main([*argv, *tiny[stage]])
            except (SystemExit, Exception) as error:
                self.wfile.write(f"{stage} {argv}: {error!r}".encode())

    def run(name: str, questions: int = 6, *words: str, **environment: str) -> list[list[str]]:
        files = tiny["create_squad_dataset.py"]
        files[3:] = [str(Path(files[1]).with_name(f"test_{questions}.json"))]
        with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
            shim = tmp_path / "bin" / "python"
            shim.parent.mkdir(exist_ok=True)
            shim.write_text(STAND_IN.format(python=sys.executable, port=server.server_address[1]))
            shim.chmod(0o755)
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            path = f"{shim.parent}{os.pathsep}{os.environ['PATH']}"
            done = subprocess.run(
                ["bash", str(tmp_path / "runs" / name), *words], check=False, capture_output=True,
                text=True, env=os.environ | {"PATH": path} | environment, cwd="/",
            )  # fmt: skip
            server.shutdown()
        assert done.returncode == 0, done.stderr
        return calls

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "files", "trainings"),
    [
        ("llama2_7b.sh", ["llama2_7b/base.csv", "llama2_7b/results.csv", "llama2_7b_30k/results.csv",
                          "llama2_7b_65k/results.csv", "llama2_7b_65k/10_beams.csv"], 3),
        ("llama2_7b_multi_turn.sh", ["multi_turn/results.csv"], 1),
        ("llama2_70b.sh", ["llama2_70b/base.csv"], 0),
        ("llama3_8b.sh", ["llama3_8b/base.csv", "llama3_8b/results.csv"], 1),
        ("reasoning_tokens.sh", ["reasoning_tokens/results.csv"], 1),
        ("smollm2_135m.sh", ["smollm2_135m/base_free.csv", "smollm2_135m/base_spans.csv",
                             "smollm2_135m/base_spans_1_beams.csv",
                             "smollm2_135m/base_spans_10_beams.csv",
                             "smollm2_135m_40000/tuned_free.csv",
                             "smollm2_135m_40000/tuned_spans.csv",
                             "smollm2_135m_40000/tuned_spans_1_beams.csv",
                             "smollm2_135m_40000/tuned_spans_10_beams.csv",
                             "smollm2_135m_40000/tuned_threshold.csv"], 1),
    ],
)  # fmt: skip
def test_run(name: str, files: Any, trainings: Any, run_script: Any, tmp_path: Path) -> None:
    questions = 64 if name == "smollm2_135m.sh" else 6
    calls = run_script(name, questions, PROCESSES="1")
    assert sum(call[0] == "train_llama_squad.py" for call in calls) == trainings
    written = [
        path.relative_to(tmp_path / "results")
        for path in tmp_path.glob("results/*/*.csv")
        if not path.name.endswith(".val.csv")  # on which a threshold is tuned
    ]
    assert sorted(map(str, written)) == sorted(files)
    for file in files:
        rows = (tmp_path / "results" / file).read_text().count('"2-')
        assert rows == questions, file  # each question's row begins with its id


@pytest.mark.slow
@pytest.mark.parametrize(
    ("study", "trained"),
    [
        ("learning_curve", ["recipe", "all parameters"]),
        ("rates", ["recipe", "rate 2e-4", "rate 4e-4", "rate 2e-3", "56 a step", "14 a step"]),
        ("adapters", ["recipe", "rank 8", "rank 128", "attention alone", "from the reply",
                      "from the question", "from the start"]),
        ("prompts", ["recipe", "question first", "question twice", "no system text"]),
        ("reasoning", ["recipe", "filler 20", "pause 1", "pause 5", "question twice"]),
        ("precision", ["unquantised", "4 bits"]),
        ("beams", ["recipe"]),
    ],
)  # fmt: skip
def test_studies(study: str, trained: list[str], run_script: Any, tmp_path: Path) -> None:
    """Each way is trained with as many questions, and each row is compared with the first."""
    calls = run_script("studies.sh", 6, study, CURVE="96", QUESTIONS="144", PROCESSES="1")
    trainings = [call for call in calls if call[0] == "train_llama_squad.py"]
    folders = [call[call.index("--output_dir") + 1] for call in trainings]
    asked = ["96", "20000"] if study == "learning_curve" else ["144"] * len(trained)
    names = zip(asked, trained, strict=True)
    model = "SmolLM2-135M-Instruct"
    assert folders == [f"results/studies/{model}/{count}/{name}" for count, name in names]
    for count, name, call in zip(asked, trained, trainings, strict=True):
        paragraphs = {"56 a step": 8, "14 a step": 2}.get(name, 4)  # of 6.85 questions
        assert call[call.index("--max_steps") + 1] == str(math.ceil(int(count) / 6.85 / paragraphs))
        assert call[call.index("--per_device_train_batch_size") + 1] == str(7 * paragraphs)
    of = f"{study}_{model}_{'96' if study == 'learning_curve' else '144'}"
    first, *others = json.loads((tmp_path / f"results_published/study_{of}.json").read_text())
    assert others and all(row["paired"]["to"] == first["name"] for row in others)
    assert all(row["n"] == row["paired"]["n"] == 6 for row in others)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["pip", "activate"])
def test_an_environment_that_was_stopped_while_it_was_made(missing: str, tmp_path: Path) -> None:
    """Venv makes python first, then pip, and activate last."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=tmp_path, check=True
    )
    if missing == "activate":
        (tmp_path / ".venv/bin/activate").unlink()
    (tmp_path / "none.txt").touch()
    script = f". {ROOT}/quickstart/venv.sh; set_up_venv none.txt && python -m pip --version"
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout  # the pip is that environment's


@pytest.mark.slow
def test_forgetting(run_script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All adapters of the study are trained, and measured by one command."""
    measured: list[list[str]] = []
    monkeypatch.setattr(forgetting, "main", measured.append)  # see test_forgetting_study.py
    monkeypatch.setattr(chat_share, "REPLY_TOKENS", 4)
    calls = run_script("forgetting.sh", EVAL_PYTHON="a python", QUESTIONS="112", DATA=str(tmp_path))
    trained = [call for call in calls if call[0] == "train_llama_squad.py"]
    assert len(trained) == 12
    assert sum("all" in call for call in trained) == 2
    for call in trained:  # 27.4 a step; 23.4, where a tenth of its 26 is chat
        last = len(call) - call[::-1].index("--max_steps")
        a_step = 23.4 if "--chat_share" in call else 27.4
        assert call[last] == str(math.ceil(112 / a_step))
        last = len(call) - call[::-1].index("--per_device_train_batch_size")
        assert call[last] == "28"
    (command,) = measured
    out = str(Path(command[command.index("--work") + 1]))
    assert out.endswith("/112")
    assert command[-2:] == ["--plot", f"{out}/forgetting.svg"]
    names = {word for word in command if word.endswith("/final_checkpoints")}
    assert len(names) == 12
    for name in names:
        folder, _, path = name.partition("=")
        assert (tmp_path / path / "adapter_config.json").is_file()
        assert path == f"{out}/{folder}/final_checkpoints"


@pytest.mark.slow
def test_carry_over(run_script: Any, tmp_path: Path) -> None:
    files = tmp_path / "data" / "carry_over"
    files.mkdir(parents=True)
    records = make_records(2, [3], seed=2)
    said = {record["id"]: {"disfluent": f"Er, {record['question']}"} for record in records[1:]}
    for name in ("new_wiki_v1.0", "reddit_v1.0", "xquad.en", "dev-v2.0"):
        squad_file(files / f"{name}.json", records)
    for part in ("dev", "test"):
        (files / f"disfl_qa_{part}.json").write_text(json.dumps(said))
    rows = [f"{record['id']}\tE\n" for record in records]
    (files / "reason_gold_test.tsv").write_text("qid\treason\n" + "".join(rows))
    calls = run_script("carry_over.sh", QUESTIONS="4")
    tested = [call for call in calls if call[0] == "test_llama_squad.py"]
    assert len(tested) == 6 and not any("--adapter_name" in str(call) for call in tested)
    published = tmp_path / "results_published"
    summaries = json.loads((published / "carry_over_base.json").read_text())
    names = ["dev", "new_wiki", "reddit", "xquad_en", "plain", "disfluent"]
    assert [summary["name"] for summary in summaries] == names
    assert summaries[0]["n"] == 6  # whole paragraphs
    assert json.loads((published / "abstentions_base.json").read_text())["E"]["n"] > 0


def run_stubbed(
    name: str, folder: Path, stubs: dict[str, str], *words: str, **environment: str
) -> Any:
    """Run a script in a copy of the repository's top, with other programs in the place of some."""
    for part in ("runs", "configs"):
        shutil.copytree(ROOT / part, folder / part)
    (folder / "bin").mkdir()
    for program, text in stubs.items():
        (folder / "bin" / program).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / program).chmod(0o755)
    path = f"{folder}/bin{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(folder / "runs" / name), *words], check=False, capture_output=True,
        text=True, env=os.environ | {"PATH": path} | environment,
    )  # fmt: skip


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    """Before anything is trained, and with what to do about it."""
    stubs = {"python": "echo python was called >&2; exit 9", "curl": "exit 6"}
    done = run_stubbed("forgetting.sh", tmp_path / "a", stubs, DATA="nowhere")
    assert (done.returncode, done.stderr.partition(":")[2][:18]) == (1, " no folder nowhere")
    done = run_stubbed("carry_over.sh", tmp_path / "b", stubs)
    assert done.returncode == 1
    assert "dev-v2.0.json: put that file at data/carry_over/dev-v2.0.json" in done.stderr


def test_processes_share_the_work(tmp_path: Path) -> None:
    """Stages run under torchrun; a training's batch, and the cores, are shared out."""
    (tmp_path / "a" / "data" / "squad_v2").mkdir(parents=True)
    say = 'echo "$OMP_NUM_THREADS $*" >> calls'
    stubs = {"torchrun": say, "python": ":", "nproc": "echo 8"}
    done = run_stubbed("smollm2_135m.sh", tmp_path / "a", stubs, PROCESSES="3", OMP_NUM_THREADS="")
    assert done.returncode == 0, done.stderr
    base, training, *evaluations = (tmp_path / "a" / "calls").read_text().splitlines()
    assert base.endswith("--output results/smollm2_135m/base_spans.csv")
    assert training.startswith("3 --nproc_per_node 3 train_llama_squad.py")
    assert "--per_device_train_batch_size 7 --max_steps 1947" in training  # 3 paragraphs a step
    assert len(evaluations) == 8
    assert "--na_prob_thresh 0.5 --output" in evaluations[0]  # whatever is kept with the adapter
    assert "--tune_threshold --output" in evaluations[2]
    assert all("--nproc_per_node 3 test_llama_squad.py" in call for call in evaluations)


def test_the_recipe_is_what_its_script_trains(tmp_path: Path) -> None:
    (tmp_path / "data" / "squad_v2").mkdir(parents=True)
    stubs = {"python": f'echo "$*" >> {tmp_path}/calls'}
    done = run_stubbed("smollm2_135m.sh", tmp_path, stubs, PROCESSES="1")
    assert done.returncode == 0, done.stderr
    recipe = yaml.safe_load((ROOT / "configs" / "smollm2_135m.yaml").read_text())["train"]
    planned = ("per_device_train_batch_size", "max_steps", "warmup_steps")
    flags = " ".join(f"--{name} {recipe[name]}" for name in planned)
    assert f"--resume_from_checkpoint auto {flags}\n" in (tmp_path / "calls").read_text()


def test_more_questions_are_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "a" / "data" / "squad_v2").mkdir(parents=True)
    stubs = {"python": f'echo "$*" >> {tmp_path}/calls'}
    done = run_stubbed("smollm2_135m.sh", tmp_path / "a", stubs, PROCESSES="1", QUESTIONS="60000")
    assert done.returncode == 0, done.stderr
    first, training, *evaluations = [
        line for line in (tmp_path / "calls").read_text().splitlines() if "_llama_squad.py" in line
    ]
    assert "--output results/smollm2_135m/base_spans.csv" in first  # of the base, for all numbers
    assert "--output_dir results/smollm2_135m_60000 " in training
    assert training.endswith("--per_device_train_batch_size 28 --max_steps 2190 --warmup_steps 110")
    outputs = [line.split("--output ")[1] for line in evaluations]
    # the untuned model's rows are of every number of questions
    of_base = ["base_spans_1_beams.csv", "base_spans_10_beams.csv", "base_free.csv"]
    assert [p.split("/")[2] for p in outputs if p.startswith("results/smollm2_135m/")] == of_base
    assert sum(path.startswith("results/smollm2_135m_60000/tuned_") for path in outputs) == 5
    (tmp_path / "c" / "data" / "squad_v2").mkdir(parents=True)
    stubs |= {
        "torchrun": f'echo "$*" > {tmp_path}/last_$3'
    }  # eight processes have eight paragraphs
    run_stubbed("smollm2_135m.sh", tmp_path / "c", stubs, PROCESSES="8", QUESTIONS="60000")
    training = (tmp_path / "last_train_llama_squad.py").read_text()
    assert "--per_device_train_batch_size 7 --max_steps 1095 " in training
    (tmp_path / "b").mkdir()
    done = run_stubbed("smollm2_135m.sh", tmp_path / "b", stubs, QUESTIONS="many")
    assert done.returncode == 2 and "QUESTIONS=many is no number" in done.stderr


def test_the_dataset_is_built_from_given_files(tmp_path: Path) -> None:
    flags = "--train_files train-*.json --test_files dev.json"
    stubs = {"python": f'echo "$*" >> {tmp_path}/calls; [ "$1" != create_squad_dataset.py ]'}
    run_stubbed("smollm2_135m.sh", tmp_path / "a", stubs, PROCESSES="1", DATA_FLAGS=flags)
    last = (tmp_path / "calls").read_text().splitlines()[-1]
    assert last.startswith("create_squad_dataset.py ") and last.endswith(flags)


def test_a_training_that_was_stopped_before_its_merge_goes_on(tmp_path: Path) -> None:
    """Its adapter is there then, but what is asked next is not."""
    out = tmp_path / "a" / "results" / "studies" / "SmolLM2-135M-Instruct" / "5000"
    (out / "unquantised" / "final_checkpoints").mkdir(parents=True)
    (out / "4 bits" / "final_merged_checkpoint").mkdir(parents=True)
    stubs = {"python": f'echo "$*" >> {tmp_path}/calls'}
    done = run_stubbed("studies.sh", tmp_path / "a", stubs, "precision", PROCESSES="1")
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    (training,) = [call for call in calls if call.startswith("train_llama_squad.py ")]
    assert "--output_dir results/studies/SmolLM2-135M-Instruct/5000/unquantised " in training


@pytest.mark.parametrize("words", [(), ("rate",), ("rates", "beams"), ("rates adapters",), ("*",)])
def test_a_study_that_is_not_there_is_refused(words: tuple[str, ...], tmp_path: Path) -> None:
    stubs = {"python": "echo python was called >&2"}
    done = run_stubbed("studies.sh", tmp_path, stubs, *words)
    assert (done.returncode, done.stderr) == (
        2,
        "studies.sh: give one of the studies that its head names\n",
    )


@pytest.mark.parametrize("questions", ["5,000", "0100", "5 0", "many"])
def test_a_number_of_questions_that_is_none_is_refused(questions: str, tmp_path: Path) -> None:
    stubs = {"python": "echo python was called >&2"}
    done = run_stubbed("studies.sh", tmp_path, stubs, "rates", QUESTIONS=questions)
    said = f"studies.sh: QUESTIONS={questions} is no number above 0, in digits\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_numbers_of_questions_and_processes(tmp_path: Path) -> None:
    """Whatever the processes, a study's rows are of as many questions; and no number is no run."""
    say = f'echo "$*" >> {tmp_path}/calls'
    stubs = {"torchrun": say, "python": f'[ "$1" = -c ] || {say}'}
    for name, more, fault in (
        ("smollm2_135m.sh", {"PROCESSES": "0"}, "PROCESSES=0"),
        ("studies.sh", {"CURVE": "100 010", "PROCESSES": "1"}, "CURVE=010"),
        ("forgetting.sh", {"QUESTIONS": "010", "DATA": str(tmp_path)}, "QUESTIONS=010"),
    ):
        done = run_stubbed(name, tmp_path / name, stubs, "learning_curve", **more)
        said = f"{name}: {fault} is no number above 0, in digits\n"
        assert (done.returncode, done.stderr) == (2, said)
    assert not (tmp_path / "calls").exists()  # before anything is trained
    for processes in (1, 3, 8):
        run_stubbed("studies.sh", tmp_path / str(processes), stubs, "adapters", QUESTIONS="20000",
                    PROCESSES=str(processes))  # fmt: skip
        lines = (tmp_path / "calls").read_text().splitlines()
        training = next(line for line in lines if "train_llama_squad.py" in line).split()
        (tmp_path / "calls").unlink()
        per_process = int(training[training.index("--per_device_train_batch_size") + 1])
        steps = int(training[training.index("--max_steps") + 1])
        paragraphs = round(per_process / 6.85) * processes * steps
        assert 20_000 <= 6.85 * paragraphs < 20_000 + 6.85 * 8


def test_what_is_carried_over_is_named_by_its_training(tmp_path: Path) -> None:
    stubs = {"python": f'echo "$*" >> {tmp_path}/calls', "curl": "exit 6"}
    for at, (adapter, name) in enumerate(
        [
            ("results/smollm2/final_checkpoints", "smollm2"),
            ("results/smollm2/final_checkpoints/", "smollm2"),
            ("results/smollm2/final_merged_checkpoint", "smollm2_merged"),
            ("results/other", "other"),
            ("results/smollm2/checkpoint-200", "smollm2_checkpoint-200"),
            ("user/adapter", "user_adapter"),
        ]
    ):
        folder = tmp_path / str(at)
        if adapter.startswith("results/"):
            (folder / adapter).mkdir(parents=True)
        files = folder / "data" / "carry_over"
        files.mkdir(parents=True)
        for file in ("dev-v2.0", "new_wiki_v1.0", "reddit_v1.0", "xquad.en", "disfl_qa_dev",
                     "disfl_qa_test"):  # fmt: skip
            (files / f"{file}.json").touch()
        done = run_stubbed("carry_over.sh", folder, stubs, adapter)
        assert done.returncode == 0, done.stderr
        last = (tmp_path / "calls").read_text().splitlines()[-1]
        assert f"--output results_published/carry_over_{name}.json" in last


def test_steps_that_processes_cannot_share_are_refused(tmp_path: Path) -> None:
    """Before anything is built: a paragraph each would be more questions than the row says."""
    say = f'echo "$*" >> {tmp_path}/calls'
    stubs = {"torchrun": say, "python": f'[ "$1" = -c ] || {say}'}
    done = run_stubbed("studies.sh", tmp_path / "a", stubs, "rates", PROCESSES="3")
    assert (done.returncode, done.stderr) == (
        2,
        "studies.sh: rates has steps of 14 questions: give PROCESSES=1 or 2\n",
    )
    assert not (tmp_path / "calls").exists()
    done = run_stubbed("studies.sh", tmp_path / "b", stubs, "rates", PROCESSES="2")
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    (training,) = [call for call in calls if "/14 a step --" in call]
    assert "--per_device_train_batch_size 7 " in training


def test_studies_of_a_folder_are_kept_by_its_name(tmp_path: Path) -> None:
    """However it is given; and no label of the environment becomes a row's."""
    (tmp_path / "a" / "my model").mkdir(parents=True)
    stubs = {"python": f'echo "$*" >> {tmp_path}/calls'}
    more = {"MODEL": "my model/.", "PROCESSES": "1", "QUESTIONS": "96", "label": "x"}
    done = run_stubbed("studies.sh", tmp_path / "a", stubs, "rates", **more)
    assert done.returncode == 0, done.stderr
    last = (tmp_path / "calls").read_text().splitlines()[-2]
    assert "recipe=results/studies/my model/96/recipe.csv" in last and "x=" not in last


def test_every_script_is_run() -> None:
    (cases,) = [mark.args[1] for mark in test_run.pytestmark if mark.name == "parametrize"]
    tested = {name for name, *_ in cases}
    assert {path.name for path in (ROOT / "runs").glob("*.sh")} == tested | {
        "carry_over.sh",
        "forgetting.sh",
        "others.sh",
        "studies.sh",
    }
