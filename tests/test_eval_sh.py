"""eval.sh with a harness that only notes how it was called; the real one where it is installed."""

import copy
import json
import math
import os
import shutil
import ssl
import statistics
import subprocess
import sys
import urllib.error
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer

from llama_squad import forgetting, harness
from llama_squad.report import render_comparison

ROOT = Path(__file__).resolve().parents[1]

FAKE_HARNESS = """
import json, math, sys
from pathlib import Path

argv = sys.argv[1:]
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(argv) + "\\n")
folder = Path(argv[argv.index("--output_path") + 1]) / "model"
folder.mkdir(parents=True)
model = json.loads(argv[argv.index("--model_args") + 1])
tuned = "peft" in model or "tuned" in model["pretrained"]
right = [1, 1, 0, 0] if not tuned else [1, 0, 0, 0]
figures = {
    "alias": "t",
    "acc,none": sum(right) / 4,
    "acc_stderr,none": 0.03,
    "ppl,none": 3.0 + tuned,
    "ppl_stderr,none": 0.3,
    "word_ppl,none": math.exp(1.5 if not tuned else 2.0),
    "em,strict": 0.75 + 0.02 * tuned,
    "em_stderr,strict": "N/A",
}
(folder / "results_2026-11-24T20-00-36.654361.json").write_text(json.dumps(
    {"results": {"t": figures, "g": {"acc,none": sum(right) / 4}}, "group_subtasks": {"g": ["t"]}}
))
with (folder / "samples_t_2026-11-24T20-00-36.654361.jsonl").open("w") as file:
    for number, value in enumerate(right):
        sample = {"doc_id": number, "filter": "none", "metrics": ["acc", "ppl", "word_ppl"]}
        sample |= {"acc": value, "ppl": [-9.0, 2], "word_ppl": [-4.0 if tuned else -3.0, 2]}
        file.write(json.dumps(sample) + "\\n")
"""


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter's folder in the current one, and a harness that only notes its calls."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", "site")
    install(FAKE_HARNESS)
    folder = tmp_path / "my, adapter"
    folder.mkdir()
    config = {"base_model_name_or_path": "meta-llama/Llama-2-7b-chat-hf", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def install(harness: str) -> None:
    """Put a harness where the current folder's Python finds it."""
    package = Path("site", "lm_eval")
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(harness)


def calls() -> list[list[str]]:
    return [json.loads(line) for line in Path("calls.jsonl").read_text().splitlines()]


def model_args(call: list[str]) -> dict[str, str]:
    return json.loads(call[call.index("--model_args") + 1])


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[str, str]:
    """Run eval.sh's Python here, without the chat check; return standard output and error."""
    forgetting.main([*argv[: argv.index("--") if "--" in argv else None], "--no_chat",
                     *(argv[argv.index("--") :] if "--" in argv else [])])  # fmt: skip
    return capsys.readouterr()


def error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the one line that it ends with."""
    with pytest.raises(SystemExit) as caught:
        forgetting.main(argv)
    said = capsys.readouterr()
    assert (caught.value.code, said.out) == (2, "")
    return said.err.splitlines()[-1]


@pytest.mark.slow
def test_base_and_tuned_side_by_side(adapter: Path) -> None:
    done = subprocess.run(
        [ROOT / "eval.sh", "my, adapter", "--device", "cpu", "--no_chat"], capture_output=True, text=True,
        env=os.environ | {"PYTHON": sys.executable}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    assert lines[0][:5] == ["task", "metric", "base", "tuned", "difference"]
    # Of four questions one changed: the differences are 0, -1, 0, 0, their deviation is 0.5.
    # All questions raise word_ppl alike, so nothing is uncertain about its difference.
    assert lines[2:7] == [
        ["t", "acc", "0.5000", "0.2500", "-0.2500", "0.2500", ""],
        ["t", "ppl", "3.0000", "4.0000", "+1.0000", "0.4243 *", "higher"],
        ["t", "word_ppl", "4.4817", "7.3891", "+2.9074", "0.0000", "higher"],
        ["t", "em (strict)", "0.7500", "0.7700", "+0.0200", "–", ""],
        ["g", "acc", "0.5000", "0.2500", "-0.2500", "0.2500", ""],
    ]
    assert done.stdout.splitlines()[-1] == "\\* of two independent samples: the true one is smaller"
    assert Path("results/lm_eval/comparison.md").read_text() == done.stdout
    found = json.loads(Path("results/lm_eval/comparison.json").read_text())
    assert found["t"]["acc"] == {
        "base": 0.5, "tuned": 0.25, "difference": -0.25, "standard_error": 0.25
    }  # fmt: skip
    assert found["t"]["em,strict"]["standard_error"] is None and "alias" not in found["t"]
    base, tuned = calls()
    name = "meta-llama/Llama-2-7b-chat-hf"
    assert model_args(base) == {"pretrained": name, "tokenizer": name, "dtype": "float32"}
    assert model_args(tuned) == model_args(base) | {"peft": "my, adapter"}
    assert base[:4] == ["run", "--model", "hf", "--output_path"]
    assert base[-6:] == ["--tasks", "openllm", "--device", "cpu", "--batch_size", "8"]
    assert "--log_samples" in base


def test_help_needs_no_harness(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "eval.sh", "--help"], capture_output=True, text=True, cwd=tmp_path, check=False,
        env=os.environ | {"PYTHON": sys.executable},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ./eval.sh MODEL")


def test_options(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (adapter / "tokenizer_config.json").write_text("{}")
    run(
        capsys, "--tasks=a,b", str(adapter), "--limit", "5", "--include_path", "tasks",
        "--base", "B", "--device=cuda:1", "--batch_size", "2", "--output_path", "my out",
        "--", "--apply_chat_template", "--num_fewshot", "3",
    )  # fmt: skip
    base = calls()[0]
    assert model_args(base) == {"pretrained": "B", "tokenizer": str(adapter), "dtype": "auto"}
    assert base[-13:] == [
        "--tasks", "a,b", "--device", "cuda:1", "--batch_size", "2",
        "--limit", "5", "--include_path", "tasks",
        "--apply_chat_template", "--num_fewshot", "3",
    ]  # fmt: skip


def test_the_run_of_the_base_is_taken_again(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--device=cpu", "--base=base", "--tasks=t"]
    other = Path("other")
    shutil.copytree(adapter, other)
    Path("base").mkdir()
    Path("base/model.safetensors").write_bytes(b"1")
    first, _ = run(capsys, str(adapter), *flags)
    again, said = run(capsys, "other", *flags)
    assert first == again
    assert "Taking the base's run in results/lm_eval/base-" in said
    assert [model_args(call).get("peft") for call in calls()] == [None, str(adapter), "other"]
    # Whatever its figures depend on asks for a run of its own: weights, tokenizer, flags, options.
    Path("base/model.safetensors").write_bytes(b"2")
    run(capsys, "other", *flags)
    (other / "tokenizer_config.json").write_text("{}")
    run(capsys, "other", *flags)
    run(capsys, "other", *flags, "--limit=3")
    run(capsys, "other", *flags, "--dtype=bfloat16")
    run(capsys, "other", *flags, "--", "--num_fewshot=1")
    assert sum("peft" not in model_args(call) for call in calls()) == 6
    install("raise SystemExit(7)")
    assert "lm_eval failed" in error(capsys, "other", *flags, "--limit=4", "--no_chat")
    install(FAKE_HARNESS)
    _, said = run(capsys, "other", *flags, "--limit=4")
    assert "Taking" not in said  # the failed run is not there


def test_merged_and_full_models(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = Path("tuned model")
    tuned.mkdir()
    (tuned / "config.json").write_text("{}")
    assert "tuned model names no base model: give it with --base" in error(
        capsys, "tuned model", "--device=cpu"
    )
    (tuned / "llama_squad.json").write_text('{"model": {"model_name": "the/base"}}')
    out, _ = run(capsys, "tuned model", "--device=cpu")
    assert [model_args(call)["pretrained"] for call in calls()] == ["the/base", "tuned model"]
    assert not any("peft" in model_args(call) for call in calls())
    assert "-0.2500" in out


@pytest.mark.slow
def test_errors_of_the_user(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    for argv, message in [
        (["nowhere"], "nowhere holds neither an adapter nor a model"),
        (["my, adapter", "--task", "x"], "unrecognized arguments: --task x"),
        (["my, adapter", "--limit"], "--limit: expected one argument"),
        (["my, adapter", "b"], "unrecognized arguments: b"),
        (["my, adapter", "--chat_prompts=none.txt"], "cannot read the prompts in none.txt"),
        (["my, adapter", "--chat_prompts=x", "--no_chat"], "not allowed with argument"),
        (["my, adapter", "--output_path=file/x"], "cannot write file/x/comparison.md: "),
        ([], "the following arguments are required: MODEL"),
    ]:
        assert message in error(capsys, *argv, "--device=cpu" if argv else "--limit=1")
    install("pass")
    assert "lm_eval left no figures" in error(capsys, str(adapter), "--device=cpu", "--no_chat")
    (adapter / "adapter_config.json").write_text("{")
    assert "my, adapter is damaged: cannot load" in error(capsys, str(adapter), "--device=cpu")
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    assert "give it with --base" in error(capsys, str(adapter), "--device=cpu")


@pytest.mark.parametrize(
    ("error", "offline"),
    [
        (urllib.error.URLError(ssl.SSLCertVerificationError("no roots")), None),
        (urllib.error.HTTPError("https://hub", 503, "busy", Message(), None), None),
        (urllib.error.URLError(OSError("no route")), "1"),
        (TimeoutError(), "1"),
    ],
)
def test_the_hub_is_left_alone_only_where_nothing_answers(
    error: Exception, offline: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr("urllib.request.urlopen", fail)
    harness.stay_offline()
    assert (os.environ["HF_HUB_OFFLINE"] or None) == offline


def test_a_harness_that_is_not_there(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\n"{sys.executable}" -S "$@"\n')  # no site-packages
    fake.chmod(0o755)
    done = subprocess.run(
        [ROOT / "eval.sh", "x"], env=os.environ | {"PYTHON": str(fake)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"-m pip install -r {ROOT}/requirements-eval.txt" in done.stderr


def test_a_missing_network_ends_in_one_line(
    adapter: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    install(
        "import sys, os\nprint('loading', file=sys.stderr, flush=True)\n"
        "raise ConnectionError(f\"Couldn't reach 'x' on the Hub {os.environ['HF_HUB_OFFLINE']}\")"
    )
    with pytest.raises(SystemExit):
        forgetting.main([str(adapter), "--device=cpu", "--no_chat"])
    lines = capfd.readouterr().err.splitlines()
    assert lines[1:-1] == ["loading"]
    assert "lm_eval failed: ConnectionError: Couldn't reach 'x' on the Hub 1: it is" in lines[-1]
    assert "check your network" in lines[-1]
    assert "Traceback" in Path("results/lm_eval").glob("*.log").__next__().read_text()


def test_paired_errors_need_the_same_questions_and_their_mean() -> None:
    def side(mean: float, *values: float, start: int = 0) -> harness.Run:
        questions = {("t", str(n + start), ""): (value, 1.0) for n, value in enumerate(values)}
        return harness.Run({"t": {"acc,none": mean}}, {}, {("t", "acc,none"): questions})

    base = side(0.5, 1, 0, 1, 0)
    assert harness.paired_errors(base, base) == {("t", "acc,none"): 0.0}
    shifted = harness.paired_errors(base, side(0.25, 1, 0, 0, 0))
    assert shifted == {("t", "acc,none"): pytest.approx(0.25)}
    assert harness.paired_errors(base, side(0.5, 1, 0, 1, 0, start=1)) == {}
    assert harness.paired_errors(base, side(0.7, 1, 0, 1, 0)) == {}
    assert harness.paired_errors(side(1.0, 1), side(1.0, 1)) == {}


def test_paired_errors_of_perplexities_are_those_of_many_samples() -> None:
    """The delta method's error is the spread of the difference over resampled questions."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(5, 40, (400,), generator=generator).float()
    noise = [torch.randn(400, generator=generator) for _ in range(2)]
    base = -words * (2.5 + 0.4 * noise[0])
    tuned = base - words * (0.1 + 0.1 * noise[1])

    def figure(values: torch.Tensor, form: str, rows: torch.Tensor | slice) -> float:
        mean = values[rows].sum() / words[rows].sum()
        return float((-mean).exp() if form == "ppl" else -mean / math.log(2))

    for form in ("ppl", "bits"):
        sides = []
        for values in (base, tuned):
            pairs = zip(values.tolist(), words.tolist(), strict=True)
            samples = {("t", str(n), ""): pair for n, pair in enumerate(pairs)}
            results = {"t": {"x,none": figure(values.double(), form, slice(None))}}
            sides.append(harness.Run(results, {}, {("t", "x,none"): samples}))
        draws = [torch.randint(400, (400,), generator=generator) for _ in range(2000)]
        spread = statistics.stdev(figure(tuned, form, d) - figure(base, form, d) for d in draws)
        error = harness.paired_errors(*sides)["t", "x,none"]
        assert error == pytest.approx(spread, rel=0.08)


def chat_folders(folder: Path) -> tuple[Path, Path, Path]:
    """Save a tiny chat model, an adapter for it that changes what it says, and the two merged."""
    peft = pytest.importorskip("peft")
    paths = folder / "base", folder / "an, adapter", folder / "merged"
    model = tiny_model()
    model.save_pretrained(paths[0])
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config)
    tuned.peft_config["default"].base_model_name_or_path = str(paths[0])
    torch.manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1.0)
    tuned.save_pretrained(paths[1])
    tuned.merge_and_unload().save_pretrained(paths[2])
    for path in paths:
        tiny_tokenizer().save_pretrained(path)
    return paths


def replies(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["replies"]


@pytest.mark.usefixtures("brief")
def test_both_sides_speak(
    tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run prints the benchmarks and the chat check, and the base is asked once."""
    base, tuned, merged = chat_folders(tmp_path / "chat")
    Path("prompts.txt").write_text("Who met Kalomir?\nHello\nWhat is it?\n")
    flags = ["--chat_prompts=prompts.txt", "--device=cpu"]
    forgetting.main([str(tuned), *flags])
    out = capsys.readouterr().out
    assert out.startswith("| task ") and "| plain prompts | % prose |" in out
    assert "points (paired standard error, 3 prompts)" in out
    folder = Path("results/lm_eval")
    assert (folder / "comparison.md").read_text() == out
    (file,) = folder.glob("chat-base-*.json")
    before, after = replies(file), replies(folder / "chat-tuned.json")
    assert [reply["prompt"] for reply in before] == ["Who met Kalomir?", "Hello", "What is it?"]
    assert [reply["text"] for reply in before] != [reply["text"] for reply in after]
    # The merged model says what the adapter says, and the base's replies are taken again.
    forgetting.main([str(merged), *flags, f"--base={base}"])
    assert f"Taking the base's replies in {file} again." in capsys.readouterr().err
    again = replies(folder / "chat-tuned.json")
    assert [reply["text"] for reply in again] == [reply["text"] for reply in after]
    assert [reply["perplexity"] for reply in again] == pytest.approx(
        [reply["perplexity"] for reply in after], rel=1e-3
    )
    # The base against itself: the same replies, whatever way they came about.
    forgetting.main([str(base), *flags, f"--base={base}"])
    assert replies(folder / "chat-tuned.json") == before
    assert "+0.0 ± 0.0 points" in capsys.readouterr().out
    # Other prompts are asked anew.
    Path("prompts.txt").write_text("Hello\n")
    forgetting.main([str(base), *flags, f"--base={base}"])
    assert "replies" not in capsys.readouterr().err
    assert len(list(folder.glob("chat-base-*.json"))) == 2


def test_a_model_without_a_chat_template_is_not_asked(
    tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, *_ = chat_folders(tmp_path / "chat")
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = None
    (base / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(base)
    forgetting.main([str(base), f"--base={base}", "--device=cpu"])
    said = capsys.readouterr()
    assert "No chat check: the tokenizer of" in said.err
    assert "| task " in said.out and "plain prompts" not in said.out


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
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "an, adapter")
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
        [ROOT / "eval.sh", "an, adapter", "--tasks=tiny_stories", "--include_path=tasks"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cells = [cell.strip() for cell in done.stdout.splitlines()[2].split("|")[1:-1]]
    # A fresh LoRA adapter changes nothing.
    assert cells == ["tiny_stories", "acc", "1.0000", "1.0000", "+0.0000", "0.0000", ""]
