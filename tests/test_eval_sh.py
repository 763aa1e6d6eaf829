"""eval.sh with a harness that only notes how it was called; the real one where it is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_squad.report import render_comparison

ROOT = Path(__file__).resolve().parents[1]

FAKE_HARNESS = """
import json, sys
from pathlib import Path

argv = sys.argv[1:]
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(argv) + "\\n")
folder = Path(argv[argv.index("--output_path") + 1]) / "model"
folder.mkdir(parents=True, exist_ok=True)
tuned = any(argument.startswith("peft=") for argument in argv)
figures = {
    "alias": "t",
    "acc,none": 0.5 - 0.25 * tuned,
    "acc_stderr,none": 0.03,
    "em,strict": 0.75 + 0.02 * tuned,
    "em_stderr,strict": "N/A",
}
(folder / f"results_{len(argv)}.json").write_text(json.dumps({"results": {"t": figures}}))
"""


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "my adapter"
    folder.mkdir()
    config = {"base_model_name_or_path": "meta-llama/Llama-2-7b-chat-hf"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def run(tmp_path: Path, *argv: str, harness: str = FAKE_HARNESS) -> Any:
    package = tmp_path / "site" / "lm_eval"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("" if harness else "raise ImportError")
    (package / "__main__.py").write_text(harness)
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(package.parent)}
    return subprocess.run(
        [ROOT / "eval.sh", *argv], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def calls(tmp_path: Path) -> list[list[str]]:
    return [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]


def test_base_and_tuned_side_by_side(tmp_path: Path, adapter: Path) -> None:
    done = run(tmp_path, "my adapter", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    assert lines[0][:5] == ["task", "metric", "base", "tuned", "difference"]
    assert lines[2:] == [
        ["t", "acc", "0.5000", "0.2500", "-0.2500", "0.0424", "lower"],
        ["t", "em (strict)", "0.7500", "0.7700", "+0.0200", "–", ""],
    ]
    assert (tmp_path / "results/lm_eval/comparison.md").read_text() == done.stdout
    base, tuned = calls(tmp_path)
    assert base == [
        "run", "--model", "hf", "--tasks", "openllm", "--device", "cpu", "--batch_size", "8",
        "--output_path", "results/lm_eval/base", "--model_args",
        "pretrained=meta-llama/Llama-2-7b-chat-hf", "tokenizer=meta-llama/Llama-2-7b-chat-hf",
        "dtype=float32",
    ]  # fmt: skip
    assert tuned == [
        *(a.replace("lm_eval/base", "lm_eval/tuned") for a in base),
        "peft=my adapter",
    ]


def test_options(tmp_path: Path, adapter: Path) -> None:
    (adapter / "tokenizer_config.json").write_text("{}")
    done = run(
        tmp_path, "--tasks=a,b", str(adapter), "--limit", "5", "--include_path", "tasks",
        "--base", "B", "--device=cuda:1", "--batch_size", "2", "--output_path", "my out",
        "--", "--apply_chat_template", "--num_fewshot", "3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert calls(tmp_path)[0] == [
        "run", "--model", "hf", "--tasks", "a,b", "--device", "cuda:1", "--batch_size", "2",
        "--output_path", "my out/base", "--model_args", "pretrained=B", f"tokenizer={adapter}",
        "dtype=auto", "--limit", "5", "--include_path", "tasks",
        "--apply_chat_template", "--num_fewshot", "3",
    ]  # fmt: skip
    again = run(tmp_path, str(adapter), "--device=cpu", "--output_path", "my out")
    assert again.stdout == done.stdout  # the figures of this run, beside those of the first


def test_errors(tmp_path: Path, adapter: Path) -> None:
    for argv, message in [
        (["nowhere"], "nowhere holds no adapter_config.json"),
        (["my adapter", "--task", "x"], "unknown flag --task"),
        (["my adapter", "--limit"], "--limit: unknown flag, or one that needs a value"),
        (["my adapter", "b"], "one adapter folder at a time, but found my adapter and b"),
        ([], "Usage: ./eval.sh"),
    ]:
        done = run(tmp_path, *argv)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
    done = run(tmp_path, "my adapter", harness="")
    assert done.returncode == 2
    assert f"-m pip install -r {ROOT}/requirements-eval.txt" in done.stderr
    done = run(tmp_path, "my adapter", "--device=cpu", harness="pass")
    assert done.returncode == 2
    assert "lm_eval left no figures in results/lm_eval/base" in done.stderr
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json is damaged" in run(tmp_path, "my adapter").stderr
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    assert "give it with --base" in run(tmp_path, "my adapter").stderr


def test_a_failing_harness_ends_the_script(tmp_path: Path, adapter: Path) -> None:
    done = run(tmp_path, "my adapter", "--device=cpu", harness="raise SystemExit(7)")
    assert (done.returncode, done.stdout) == (7, "")


def test_comparison_passes_over_what_one_side_lacks() -> None:
    table = render_comparison(
        {"t": {"acc,none": 1.0, "x,none": 1}, "u": {"acc,none": 1}}, {"t": {"acc,none": 1.0}}
    )
    assert len(table.splitlines()) == 3


@pytest.mark.slow
def test_the_real_harness(tmp_path: Path, shared_data: Path) -> None:
    python = os.environ.get("LM_EVAL_PYTHON", sys.executable)
    if subprocess.run(
        [python, "-c", "import lm_eval"], capture_output=True, check=False
    ).returncode:
        pytest.skip("lm_eval is not installed: set LM_EVAL_PYTHON to a Python that has it")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = shared_data / "checkpoints/stories260K/hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "data.jsonl").write_text(
        '{"text": "Once upon a", "choices": [" time", " xylophone"], "label": 0}\n'
        '{"text": "They went to the", "choices": [" zqk", " park"], "label": 1}\n'
    )
    (tasks / "task.yaml").write_text(
        "task: tiny_stories\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tasks}/data.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{label}}'\n"
        "metric_list: [{metric: acc}]\n"
    )
    environment = os.environ | {"PYTHON": python, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [ROOT / "eval.sh", "adapter", "--tasks=tiny_stories", "--include_path=tasks"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cells = [cell.strip() for cell in done.stdout.splitlines()[2].split("|")[1:-1]]
    # A fresh LoRA adapter changes nothing.
    assert cells == ["tiny_stories", "acc", "1.0000", "1.0000", "+0.0000", "0.0000", ""]
