"""The command line: what is refused before anything is loaded, and what --help lists."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import train_llama_squad
from llama_squad.arguments import TrainerArguments
from llama_squad.flags import sft_config_fields, unknown_flags

STAGES = [
    "create_squad_dataset.py",
    "train_llama_squad.py",
    "test_llama_squad.py",
    "summarize_results.py",
    "app.py",
]
SLOW = {"torch", "trl", "datasets", "peft", "gradio", "bitsandbytes"}


def run(cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a stage in a folder, and add to its errors which slow modules it loaded."""
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"sys.argv = {[*argv]!r}\n"
        f"try: runpy.run_path({str(ROOT / argv[0])!r}, run_name='__main__')\n"
        "finally: print('loaded', sorted(m for m in sys.modules if '.' not in m), file=sys.stderr)"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )


def loaded(done: subprocess.CompletedProcess[str]) -> set[str]:
    return SLOW & set(re.findall(r"'(\w+)'", done.stderr.rpartition("loaded ")[2]))


def test_the_library_s_flags_are_known_without_loading_it() -> None:
    from trl import SFTConfig

    fields = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    assert sft_config_fields() == fields


def test_our_defaults_of_the_library_s_flags() -> None:
    from trl import SFTConfig

    theirs = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    ours = {field.name: field.default for field in dataclasses.fields(TrainerArguments)}
    changed = {name: value for name, value in ours.items() if theirs[name] != value}
    assert changed == {
        "output_dir": "results",
        "learning_rate": 2e-7,
        "max_length": 4096,
        "train_sampling_strategy": "group_by_length",
        "eval_strategy": "steps",
        "eval_steps": 500,
        "report_to": "auto",
    }


def test_words_of_a_later_parser_are_passed_over() -> None:
    words = ["--weight_decay", "-0.1", "--optim=x", "--no-x", "--wrong", "1", "--x-y", "a", "b"]
    later = {"weight_decay", "optim", "x", "x_y"}
    assert list(unknown_flags(words, later)) == ["--wrong", "1"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning_rate=1"], "unknown flag --lerning_rate (did you mean --learning_rate?)"),
        (["--weight_decy", "1"], "unknown flag --weight_decy (did you mean --weight_decay?)"),
        (["--lora_r", "many"], "argument --lora_r/--lora-r: invalid int value: 'many'"),
        (["--max_steps=0"], "--max_steps must be at least 1, or -1 to go by epochs, not 0"),
        (["--max_steps=-2"], "--max_steps must be at least 1, or -1 to go by epochs, not -2"),
        (["--reasoning_tokens=-1"], "--reasoning_tokens must be at least 0, not -1"),
        (["--eval_samples=-1"], "--eval_samples must be at least 0, not -1"),
        (["--per_device_train_batch_size=0"], "--per_device_train_batch_size must be at least 1"),
        (["--per_device_train_batch_size=-4"], "--per_device_train_batch_size must be at least 1"),
        (["--gradient_accumulation_steps=-1"], "--gradient_accumulation_steps must be at least 1"),
        (["--per_device_eval_batch_size=-1"], "--per_device_eval_batch_size must be at least 1"),
        (["--gradient_accumulation_steps=0"], "--gradient_accumulation_steps must be at least 1"),
        (["--lora_alpha=0"], "--lora_alpha must be above 0, not 0"),
        (["--lora_alpha=-16"], "--lora_alpha must be above 0, not -16"),
        (["--lora_r=0"], "--lora_r must be at least 1, not 0"),
        (["--lora_dropout=1"], "--lora_dropout must be at least 0 and below 1, not 1.0"),
        (["--num_train_epochs=0"], "--num_train_epochs must be above 0, not 0.0"),
        (["--eval_steps=0"], "--eval_steps must be above 0, not 0.0"),
        (["--logging_steps=0"], "--logging_steps must be above 0, not 0.0"),
        (["--save_steps=-1"], "--save_steps must be above 0, not -1.0"),
        (["--full_parameters", "--lora_r=8"], "so --lora_r would do nothing"),
    ],
)
def test_flags_of_training_refused(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        train_llama_squad.main(argv)
    assert message in f"{error.value}{capsys.readouterr().err}"


@pytest.mark.parametrize("stage", STAGES)
def test_help_loads_nothing_slow_and_keeps_the_examples_on_their_lines(
    stage: str, tmp_path: Path
) -> None:
    done = run(tmp_path, stage, "--help")
    assert not loaded(done), done.stderr
    lines = done.stdout.splitlines()
    examples = [line for line in lines if line.startswith(f"    python {stage}")]
    assert examples and max(map(len, examples)) < 100
    assert not re.search(r"--\w+-\w+", done.stdout), "a flag in two spellings"
    named = re.findall(r"^  --(?:\[no_\])?(\w+)", done.stdout, re.M)
    assert len(named) == len(set(named)) and "config" in named
    assert "SUPPRESS" not in done.stdout
    assert "data:" in lines and lines.index("data:") < lines.index("more:")


@pytest.mark.slow
def test_help_all_lists_the_library_s_flags_but_those_that_are_refused(tmp_path: Path) -> None:
    own, everything = (
        run(tmp_path, "train_llama_squad.py", f).stdout for f in ("--help", "--help_all")
    )
    assert "--lora_r N" in own and "--max_steps N" in own and "--help_all" in own
    assert "--weight_decay" not in own
    assert everything.index("--lora_r N") < everything.index("TRL's SFTConfig:")
    assert everything.index("TRL's SFTConfig:") < everything.index("--weight_decay X")
    assert "--packing" not in everything and "--trust_remote_code" not in everything
