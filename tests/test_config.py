"""The configuration: defaults < file < saved < flags, strict, and every shipped YAML."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from llama_squad.arguments import (
    AppArguments,
    CreateArguments,
    EvalArguments,
    ModelArguments,
    TrainArguments,
)
from llama_squad.config import (
    STAGES,
    load_run_config,
    load_yaml,
    nearest,
    parse_stage,
    provenance,
    save_run_config,
)
from llama_squad.prompts import SYSTEM_PROMPT

CONFIGS = [ROOT / "config.yaml", *sorted((ROOT / "configs").glob("*.yaml"))]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a configuration file and return its path."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        path = tmp_path / "some.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def parse(*argv: str, **options: Any) -> Any:
    return parse_stage("create", (CreateArguments,), argv, **options)[0]


def test_defaults_file_saved_flags(config: Any) -> None:
    assert parse() == CreateArguments()
    assert parse().system_prompt == SYSTEM_PROMPT
    file = config("prompt: multi_turn\ncreate:\n  seed: 1\n  validation_ratio: 0.2\n")
    assert parse("--config", file) == CreateArguments(
        prompt="multi_turn", seed=1, validation_ratio=0.2
    )
    saved = {"seed": 2, "validation_ratio": 0.3, "not_a_flag_here": 1}
    args = parse("--config", file, "--validation_ratio=0.4", saved=lambda parsed: saved)
    assert args == CreateArguments(prompt="multi_turn", seed=2, validation_ratio=0.4)


def test_section_beats_top_and_null_is_none(config: Any) -> None:
    file = config("seed: 1\ncreate:\n  seed: 3\n  train_files: null\n")
    assert parse(f"--config={file}") == CreateArguments(seed=3)
    file = config("create:\n  train_files: [a b.json, c.json]\n  source: --odd\n")
    assert parse("--config", file).source == "--odd"
    assert parse("--config", file).train_files == ["a b.json", "c.json"]
    assert parse("--config", file, "--seed=4").train_files == ["a b.json", "c.json"]


def test_a_list_that_ends_the_file_takes_no_stray_word(
    config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config("create:\n  source: s\n  train_files: [mine.json]\n")
    with pytest.raises(SystemExit):
        parse("other.json", "--config", file)
    assert "unexpected argument 'other.json'" in capsys.readouterr().err


def test_config_yaml_of_the_current_folder(config: Any, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("create: {seed: 9}\n")
    assert parse().seed == 9
    assert parse("--config", config("")).seed == 42


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "+1e-6", ".1e-5", "0.000001"])
def test_numbers(config: Any, text: str) -> None:
    assert load_yaml(Path(config(f"x: {text}")))["x"] == 1e-6
    assert load_yaml(Path(config("x: 12")))["x"] == 12
    assert load_yaml(Path(config("x: 1e-6b")))["x"] == "1e-6b"


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("create:\n  sed: 1", (), "unknown key 'sed' in `create:` (did you mean seed?)"),
        ("promt: single_turn", (), "unknown key 'promt' at the top (did you mean prompt?)"),
        ("creat:\n  seed: 1", (), "unknown key 'creat' at the top (did you mean create?)"),
        ("validation_ratio: 0.1", (), "it belongs in the section `create:`"),
        ("create:\n  seed: soon", (), "some.yaml: error: argument --seed: invalid int value"),
        ("create: 3", (), "section 'create' must hold"),
        ("- a", (), "expected `key: value` lines"),
        ("a: [", (), "some.yaml"),
        ("dataset_name: {{DATA}}", (), "some.yaml: unhashable type: 'dict'"),
        ("create:\n  seed: 1\n  seed: 2", (), "line 3: key 'seed' is there twice"),
        ("", ("--sead", "1"), "unknown flag --sead (did you mean --seed?)"),
        ("", ("--see=1",), "unknown flag --see (did you mean --seed?)"),  # no abbreviations
        ("", ("extra",), "unexpected argument 'extra'"),
        ("", ("--seed", "x"), "argument --seed: invalid int value: 'x'"),
        ("", ("--prompt", "three_turn"), "invalid choice: 'three_turn'"),
    ],
)
def test_refused(
    config: Any, capsys: pytest.CaptureFixture[str], text: str, argv: Any, message: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse("--config", config(text), *argv)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {lora_r: null}", "some.yaml, `train:`: 'lora_r' is null: give it a value"),
        ("model_name: null", "some.yaml: 'model_name' is null: give it a value"),
        ("train: {max_length: 5, max_seq_length: 6}", "'max_seq_length' is another name of a key"),
        ("train: {lora_r: no}", "invalid int value: 'False'"),
    ],
)
def test_refused_in_training(
    config: Any, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    from llama_squad.training.arguments import SquadSFTConfig

    with pytest.raises(SystemExit) as exit_info:
        parse_stage(
            "train", (TrainArguments, ModelArguments, SquadSFTConfig), ["--config", config(text)]
        )
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_aliases_nulls_and_no_in_the_file(config: Any) -> None:
    from llama_squad.training.arguments import SquadSFTConfig

    file = config(
        "attn_implementation: null\n"
        "train: {max_seq_length: 512, eval_strategy: no, save_strategy: no, eval_steps: null,"
        " resume_from_checkpoint: no}\n"
    )
    types = (ModelArguments, SquadSFTConfig)
    model, sft = parse_stage("train", types, ["--config", file])
    assert (sft.max_length, sft.eval_strategy, sft.save_strategy) == (512, "no", "no")
    assert sft.resume_from_checkpoint is None
    assert model.attn_implementation is None
    _, sft = parse_stage("train", types, ["--config", file, "--max_seq_length=256"])
    assert sft.max_length == 256
    _, sft = parse_stage("train", types, ["--config", config("train: {max_length: null}")])
    assert sft.max_length is None


def test_a_file_that_is_no_utf8_is_named(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(config(""))
    path.write_bytes("seed: 1  # stra\xdfe".encode("latin-1"))
    with pytest.raises(SystemExit):
        parse("--config", str(path))
    assert f"{path} is not UTF-8 text" in capsys.readouterr().err


def test_keys_may_be_merged(config: Any) -> None:
    args = parse("--config", config("create:\n  <<: {seed: 3, prompt: multi_turn}\n  seed: 4"))
    assert (args.seed, args.prompt) == (4, "multi_turn")


def test_what_is_merged_may_be_merged_again(config: Any) -> None:
    text = "train: {inner: &a {<<: {seed: 1}, seed: 2}}\ncreate: {<<: *a}"
    assert load_yaml(Path(config(text)))["create"] == {"seed": 2}


def test_the_last_file_counts(config: Any, tmp_path: Path) -> None:
    first = tmp_path / "first.yaml"
    first.write_text("create: {seed: 1}")
    for flags in (["--config", str(first)], [f"--config={first}"]):
        assert parse(*flags, "--config", config("create: {seed: 2}")).seed == 2


def test_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--config", "nowhere.yaml")
    assert "cannot read the configuration nowhere.yaml" in capsys.readouterr().err


def test_nearest() -> None:
    assert nearest("lerning_rate", ["learning_rate", "seed"]) == " (did you mean learning_rate?)"
    assert nearest("zzz", ["learning_rate"]) == ""


def test_run_config_round_trip(tmp_path: Path) -> None:
    save_run_config(tmp_path, "create", create=CreateArguments(seed=5), extra={"a": [1]})
    saved = load_run_config(tmp_path)
    assert saved["stage"] == "create"
    assert saved["create"] == dataclasses.asdict(CreateArguments(seed=5))
    assert saved["extra"] == {"a": [1]}
    assert saved["versions"]["torch"].startswith("2.")
    assert load_run_config(tmp_path / "nowhere") == {}
    (tmp_path / "llama_squad.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_run_config(tmp_path)


def test_provenance_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance()["commit"] is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_yaml_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real command line of every stage."""
    from llama_squad.arguments import SummarizeArguments
    from llama_squad.training.arguments import SquadSFTConfig

    monkeypatch.chdir(ROOT)
    stages = {
        "create": (CreateArguments,),
        "train": (TrainArguments, ModelArguments, SquadSFTConfig),
        "test": (EvalArguments, ModelArguments),
        "summarize": (SummarizeArguments,),
        "app": (AppArguments, ModelArguments),
    }
    assert tuple(stages) == STAGES
    content = yaml.safe_load(path.read_text())
    for stage, types in stages.items():
        parsed = parse_stage(stage, types, ["--config", str(path)])
        values = {k: v for args in parsed for k, v in vars(args).items()}
        for key, value in (content.get(stage) or {}).items():
            if isinstance(value, int | bool) or key == "output":
                assert values[key] == value, (stage, key)
        if stage == "train" and "learning_rate" in content.get("train", {}):
            assert isinstance(values["learning_rate"], float)
        if "model_name" in values.keys() & content.keys():  # else an adapter brings it
            assert values["model_name"] == content["model_name"]
