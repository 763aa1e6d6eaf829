"""The commands that the README, the recipes and the scripts name are real ones."""

import re
import shlex
from typing import Any

import pytest
import seed_faults
from conftest import ROOT

from llama_squad.arguments import (
    AppArguments,
    CreateArguments,
    EvalArguments,
    ModelArguments,
    TrainArguments,
)
from llama_squad.config import parse_stage

SOURCES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "quickstart.sh",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "configs").glob("*.yaml")),
    *sorted(ROOT.glob("*.py")),
    *sorted((ROOT / "llama_squad").rglob("*.py")),
    ROOT / "benchmarks" / "RESULTS.md",
]


def commands(text: str) -> list[str]:
    """Find `python STAGE.py ...`, up to the end of the code or the line (joined at backslashes)."""
    text = text.replace("\\\n", " ")
    found = re.findall(r"python ([a-z_]+\.py\b[^`\n\"#]*)", text)
    return [re.sub(r" {2,}.*|[…,].*", "", command).strip() for command in found]


FOUND = [
    (source.name, command)
    for source in SOURCES
    if source.is_file()
    for command in commands(source.read_text(encoding="utf-8"))
]


def test_finds_commands() -> None:
    for document, least in (("README.md", 7), ("stages.md", 10)):
        assert len([c for name, c in FOUND if name == document]) >= least, document
    assert {"quickstart.sh", "llama2_7b.yaml", "multi_turn.yaml"} <= {name for name, _ in FOUND}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in (
        "python create_squad_dataset.py",
        "python test_llama_squad.py --adapter_name=results/final_checkpoints",
        "python summarize_results.py",
        "./eval.sh results/final_checkpoints",
        "python app.py --adapter_name=results/final_checkpoints",
        "./quickstart.sh",
        "./tests/run.sh",
    ):
        assert re.search(rf"^{re.escape(line)}\b", text, re.M), line


@pytest.mark.parametrize(("source", "command"), FOUND, ids=lambda value: value[:60])
def test_parses(source: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_squad.arguments import SummarizeArguments
    from llama_squad.training.arguments import SquadSFTConfig

    monkeypatch.chdir(ROOT)
    stages: dict[str, tuple[str, list[type]]] = {
        "create_squad_dataset.py": ("create", [CreateArguments]),
        "train_llama_squad.py": ("train", [TrainArguments, ModelArguments, SquadSFTConfig]),
        "test_llama_squad.py": ("test", [EvalArguments, ModelArguments]),
        "summarize_results.py": ("summarize", [SummarizeArguments]),
        "app.py": ("app", [AppArguments, ModelArguments]),
    }
    filled = re.sub(
        r"\{[^}]*\}|\$[a-z]+", "x", command.replace("$config", "configs/quickstart.yaml")
    )
    filled = re.sub(r"(?<= )x(?==)", "--adapter_name", filled)  # the model card's {flag}
    script, *argv = shlex.split(filled)
    if script not in stages:
        assert (ROOT / script).is_file(), f"{source} names {script}"
        return
    while script == "summarize_results.py" and argv and not argv[0].startswith("-"):
        argv.pop(0)
    stage, types = stages[script]
    parsed = parse_stage(stage, types, argv)
    given = {name.split("=")[0].lstrip("-") for name in argv if name.startswith("--")} - {"config"}
    known = {name for args in parsed for name in vars(args)} | {"max_seq_length"}
    assert {name.removeprefix("no_") for name in given} <= known


def test_recipes_do_not_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two write to one place with other settings, and every adapter comes from one of them."""
    from llama_squad.training.arguments import SquadSFTConfig

    monkeypatch.chdir(ROOT)
    tested: dict[str, tuple[EvalArguments, ModelArguments]] = {}
    trained: dict[str, list[Any]] = {}
    for _, command in FOUND:
        script, *argv = shlex.split(command)
        if not any(name.startswith("configs/") for name in argv):
            continue
        if "quickstart" in command or "feedback" in command:  # no rows of the table
            continue
        if script == "test_llama_squad.py":
            args, model = parse_stage("test", (EvalArguments, ModelArguments), argv)
            assert tested.setdefault(args.output, (args, model)) == (args, model), args.output
            # The original's pipeline divides a beam's log-probability by its length.
            assert args.length_penalty == (1.0 if args.num_beams == 10 else 0.0), command
            ours = ("configs/reasoning_tokens.yaml", "configs/activated.yaml")  # no original's rows
            assert args.decoding == "free" or any(name in command for name in ours), command
        elif script == "train_llama_squad.py":
            types = (TrainArguments, ModelArguments, SquadSFTConfig)
            *settings, sft = parse_stage("train", types, argv)
            settings += [sft.max_steps, sft.learning_rate]
            assert trained.setdefault(sft.output_dir, settings) == settings, sft.output_dir
    adapters = {args.adapter_name for args, _ in tested.values()} - {None}
    assert adapters == {f"{folder}/final_checkpoints" for folder in trained}
    assert len(tested) >= 7


def test_files_that_the_readme_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text[text.index("## What is where") : text.index("## Style")]
    names = re.findall(r"^(?:  )?([\w./]+\.(?:py|sh|yaml))", tree, re.M)
    assert len(names) >= 18
    for name in names:
        places = [ROOT / name, *(ROOT / "llama_squad").rglob(name)]
        assert any(place.is_file() for place in places), name
    for recipe in re.findall(r"configs/\w+\.yaml", text):
        assert (ROOT / recipe).is_file(), recipe
    package = {path.name for path in (ROOT / "llama_squad").rglob("[a-z]*.py")}
    assert package <= set(re.findall(r"\w+\.py", tree)), "a module is missing from the tree"


def test_seeded_faults_are_aimed_at_what_is_there() -> None:
    assert seed_faults.misaimed() == []
