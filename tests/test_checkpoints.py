"""Going on from a checkpoint: which one is found, and which settings it may not differ in."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    dataset_folder,
    encoded_dataset,
    make_records,
    make_trainer,
    model_folder,
    tiny_model,
    tiny_tokenizer,
)

import train_llama_squad
from llama_squad import modeling
from llama_squad.arguments import ModelArguments, TrainArguments
from llama_squad.config import RUN_CONFIG, load_run_config
from llama_squad.data import load_squad
from llama_squad.durable import hold
from llama_squad.encoding import ChatEncoder
from llama_squad.training import publishing
from llama_squad.training.arguments import SquadSFTConfig
from llama_squad.training.checkpoints import (
    RUN_RECORD,
    check_resume,
    find_checkpoint,
    run_record,
)
from llama_squad.training.trainer import SquadTrainer

pytestmark = pytest.mark.usefixtures("offline")

FROM = "results/checkpoint-2"
RECORDS = make_records(6, [3, 2])


# Which one -------------------------------------------------------------------------------------


def checkpoint(name: str, state: str | None = '{"global_step": 1}') -> Path:
    """Make a checkpoint's folder, its state as given."""
    folder = Path("results") / name
    folder.mkdir(parents=True)
    if state is not None:
        (folder / "trainer_state.json").write_text(state)
    return folder


def test_find_checkpoint() -> None:
    find = find_checkpoint
    assert find(None, "results") is None
    with pytest.raises(ValueError, match="no complete checkpoint in results"):
        find("latest", "results")
    assert find("auto", "results") is None
    nine = checkpoint("checkpoint-9")
    ten = checkpoint("checkpoint-10")
    checkpoint("checkpoint-11", None)  # killed before its state was written,
    checkpoint("checkpoint-12", json.dumps({"global_step": 12})[:-4])  # and in the middle of it
    checkpoint("checkpoint-best")
    assert find("latest", "results") == find("auto", "results") == str(ten)
    assert find(str(nine), "results") == str(nine)
    assert find("results/checkpoint-best", "results") == "results/checkpoint-best"
    with pytest.raises(ValueError, match="no complete checkpoint in results/checkpoint-11"):
        find("results/checkpoint-11", "results")


def test_of_several_runs_in_a_folder_its_own_is_gone_on_with(
    begun: Path, capsys: pytest.CaptureFixture
) -> None:
    longer = Path("results/checkpoint-9")
    shutil.copytree(FROM, longer)
    saved = json.loads((longer / "llama_squad.json").read_text())
    saved[RUN_RECORD]["seed"] += 1
    (longer / "llama_squad.json").write_text(json.dumps(saved))
    record = load_run_config(FROM)[RUN_RECORD]
    assert find_checkpoint("auto", "results") == str(longer)
    assert find_checkpoint("auto", "results", record) == "results/checkpoint-3"  # of three steps
    assert find_checkpoint("auto", "results", record | {"seed": -1}) == str(longer)  # to be refused
    run("--resume_from_checkpoint", "auto")
    said = f"Going on from results/checkpoint-3: {longer} is another run's."
    assert said in capsys.readouterr().out
    Path("results/checkpoint-2/llama_squad.json").write_text("")  # damaged: it is no such run
    assert find_checkpoint("auto", "results", record) == "results/checkpoint-3"


def test_an_adapter_is_told_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = checkpoint("checkpoint-1")
    (folder / "scheduler.pt").touch()
    saved = {RUN_RECORD: {"from_adapter": "a", "adapter": "1"}}
    (folder / "llama_squad.json").write_text(json.dumps(saved))
    assert check_resume(str(folder), {"from_adapter": "moved", "adapter": "1"}, False) == []
    with pytest.raises(ValueError, match="adapter: '1' in the checkpoint, '2' now"):
        check_resume(str(folder), {"from_adapter": "a", "adapter": "2"}, False)


def test_two_runs_do_not_share_a_folder(begun: Path) -> None:
    with (
        hold(Path("results/.lock"), "results", "--output_dir"),
        pytest.raises(SystemExit, match="another process is writing results: wait for it, or choo"),
    ):
        run()
    assert not Path("results/.lock").exists()


# With which settings ---------------------------------------------------------------------------


def run(*flags: str, model: str = "model", data: str = "dataset") -> None:
    """Train for three steps of about four questions each, with a checkpoint after two."""
    train_llama_squad.main(
        ["--model_name", model, "--dataset_name", data, "--no_quantize", "--lora_r", "4",
         "--lora_dropout", "0", "--per_device_train_batch_size", "4", "--max_steps", "3",
         "--save_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-2", "--report_to",
         "none", "--disable_tqdm", "True", *flags]
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train once; returns the folder with model, dataset and results."""
    folder = tmp_path_factory.mktemp("made")
    dataset_folder(folder, RECORDS)
    model_folder(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run()
    return folder


def test_only_the_final_folder_has_a_card(made: Path) -> None:
    cards = {path.parent.name for path in (made / "results").rglob("README.md")}
    assert "final_checkpoints" in cards and "results" not in cards


@pytest.fixture
def begun(made: Path, tmp_path: Path) -> Path:
    """Make a copy of it to work in, which is the current folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def refused(monkeypatch: pytest.MonkeyPatch, *flags: str, **names: str) -> str:
    """Return the message with which a run is refused, before it loads the model."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(modeling, "load_model", lambda *_, **__: pytest.fail("the model is loaded"))
        run("--resume_from_checkpoint", FROM, *flags, **names)
    message = str(stopped.value)
    assert "\n" not in message
    return message


def differences(message: str) -> list[str]:
    """Return the settings that a message names."""
    found = re.search(r"\((.*)\)[:,]", message)
    assert found, message
    return sorted(part.split(": ")[0] for part in found[1].split("; "))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--per_device_train_batch_size 3", "per_device_train_batch_size: 4 in the checkpoint, 3"),
        ("--gradient_accumulation_steps 2", "gradient_accumulation_steps: 1 in the checkpoint, 2"),
        ("--max_seq_length 1000", "max_length: 4096 in the checkpoint, 1000 now"),
        ("--row_tokens 100", "row_tokens: 2048 in the checkpoint, 100 now"),
        ("--no_share_context", "share_context: True in the checkpoint, False now"),
        ("--seed 7", "seed: 42 in the checkpoint, 7 now"),
        ("--max_steps 9", "max_steps: 3 in the checkpoint, 9 now"),
        ("--max_steps -1", "max_steps: 3 in the checkpoint, -1 now"),
        ("--lr_scheduler_type cosine", "lr_scheduler_type: 'linear' in the checkpoint, 'cosine'"),
        ("--warmup_steps 1", "warmup_steps: 0 in the checkpoint, 1"),
        ("--lora_alpha 8", "lora_alpha: 16 in the checkpoint, 8 now"),
        ("--lora_dropout 0.2", "lora_dropout: 0.0 in the checkpoint, 0.2 now"),
        ("--label_smoothing_factor 0.1", "label_smoothing_factor: 0.0 in the checkpoint, 0.1"),
        ("--dtype bfloat16", "dtype: 'auto' in the checkpoint, 'bfloat16' now"),
    ],
)
def test_other_settings_are_refused_by_name(
    flags: str, named: str, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refused(monkeypatch, *flags.split())
    assert named in message
    assert len(differences(message)) == 1
    assert "--resume_anyway" in message


@pytest.mark.parametrize("anyway", [False, True])
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--lora_r 8", "lora_r: 4 in the checkpoint, 8 now"),
        ("--lora_target_modules q_proj", "lora_target_modules: ['all-linear'] in the checkpoint"),
        ("--use_dora True", "use_dora: False in the checkpoint, True now"),
        ("--full_parameters", "full_parameters: False in the checkpoint, True now"),
        ("--reasoning_tokens 2", "reasoning_tokens: 0 in the checkpoint, 2 now"),
        ("--learning_rate 1e-3", "learning_rate: 0.01 in the checkpoint, 0.001 now"),
        ("--weight_decay 0.1", "weight_decay: 0.0 in the checkpoint, 0.1 now"),
    ],
)
def test_what_the_saved_weights_and_optimizer_hold_cannot_differ(
    flags: str, named: str, anyway: bool, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*flags.split(), *["--resume_anyway"] * anyway]
    if "--full_parameters" in words:  # which takes no flags of an adapter
        monkeypatch.setattr("llama_squad.checks.check_adapter_flags", lambda *_: None)
    message = refused(monkeypatch, *words)
    assert named in message
    assert f"go with its own {flags.split(maxsplit=1)[0][2:]}: give" in message
    assert "--resume_anyway" not in message


def test_each_of_several_differences_is_named(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refused(monkeypatch, "--seed", "7", "--per_device_train_batch_size", "3")
    assert differences(message) == ["per_device_train_batch_size", "seed"]
    message = refused(monkeypatch, "--seed", "7", "--lora_r", "8")
    assert differences(message) == ["lora_r", "seed"]
    assert "go with its own lora_r: give" in message  # what cannot be passed over


def change_answer(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take the last answer away."""
    return [*records[:-1], {**records[-1], "answers": {"text": [], "answer_start": []}}]


@pytest.mark.parametrize(
    ("change", "create", "named"),
    [
        (lambda records: records[:-1], {}, ["questions"]),
        (lambda records: records[::-1], {}, ["questions"]),
        (change_answer, {}, ["questions"]),
        (list, {"prompt": "multi_turn"}, ["prompt"]),
        (list, {"system_prompt": "Be exact."}, ["system_prompt"]),
        (change_answer, {"prompt": "multi_turn"}, ["prompt", "questions"]),
    ],
)
def test_another_dataset_is_refused_under_the_same_name(
    change: Callable[[list], list],
    create: dict[str, Any],
    named: list[str],
    begun: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.rmtree("dataset")
    dataset_folder(begun, change(RECORDS), **create)
    assert differences(refused(monkeypatch)) == named


def test_the_same_dataset_and_model_go_on_under_other_names(
    begun: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.rmtree("dataset")
    (begun / "built").mkdir()
    data = dataset_folder(begun / "built", RECORDS, make_records(2, [2], seed=5))
    Path("model").rename("base")
    run("--resume_from_checkpoint", FROM, "--output_dir", "more", model="base", data=data)
    assert "other settings" not in capsys.readouterr().out
    state = json.loads(Path("more/checkpoint-3/trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]


def test_another_wording_of_the_prompt_is_refused(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    monkeypatch.setattr("llama_squad.data.build_messages", lambda *_: words)
    dataset_folder(begun, RECORDS)
    assert differences(refused(monkeypatch)) == ["messages"]


def test_another_template_tokenizer_or_model_is_refused(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tiny_tokenizer().chat_template
    Path("template.jinja").write_text(template + "\n\n{# and more #}", encoding="utf-8")
    message = refused(monkeypatch, "--chat_template", "template.jinja")
    assert differences(message) == ["chat_template"]
    content = json.loads(Path("model/tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"].pop()
    Path("model/tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert differences(refused(monkeypatch)) == ["tokenizer"]
    model_folder(begun)
    assert "cannot" not in refused(monkeypatch, "--seed", "1")
    tiny_model(seed=1).save_pretrained("model")
    assert differences(refused(monkeypatch)) == ["weights"]


def test_the_number_of_processes_is_part_of_the_record(begun: Path) -> None:
    settings = publishing.run_settings(
        TrainArguments(dataset_name="dataset"),
        ModelArguments(model_name="model"),
        SquadSFTConfig(report_to="none").to_dict(),
    )
    train, encoder = load_squad("dataset")["train"], ChatEncoder(tiny_tokenizer())
    one, two = (run_record(settings, train, encoder, n) for n in (1, 2))
    assert {name for name in one if one[name] != two[name]} == {"processes"}
    assert run_record(settings, train, encoder, 1) == one
    encoder.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    assert run_record(settings, train, encoder, 1) == one  # whatever it was last used for


def test_resume_anyway_goes_on_and_says_what_differs(
    begun: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--resume_from_checkpoint", FROM, "--max_steps", "5", "--output_dir", "more"]
    run(*flags, "--resume_anyway", "--per_device_train_batch_size", "3")
    said = capsys.readouterr().out
    assert f"Going on from {FROM} with other settings: " in said
    assert "max_steps: 3 in the checkpoint, 5 now" in said
    assert "per_device_train_batch_size: 4 in the checkpoint, 3 now" in said
    assert Path("more/checkpoint-5").is_dir()
    # what goes on from there is compared with this run
    run("--resume_from_checkpoint", "more/checkpoint-4", "--max_steps", "5",
        "--per_device_train_batch_size", "3", "--output_dir", "most")  # fmt: skip
    assert "other settings" not in capsys.readouterr().out


def test_weights_alone_are_not_gone_on_with_unsaid(
    begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As --save_only_model leaves them: optimizer and schedule would start anew."""
    for name in ("optimizer.pt", "scheduler.pt"):
        Path(FROM, name).unlink()
    said = "neither optimizer nor schedule was saved: --save_only_model"
    assert said in refused(monkeypatch)
    run("--resume_from_checkpoint", FROM, "--resume_anyway", "--output_dir", "more")
    assert f"with other settings: {said}." in capsys.readouterr().out


def test_a_complete_run_is_not_trained_further(begun: Path) -> None:
    """One that was stopped as its result was saved or merged."""
    before = Path("results/final_checkpoints/adapter_model.safetensors").read_bytes()
    run("--max_steps", "4", "--lr_scheduler_type", "constant", "--output_dir", "whole")
    final = Path("whole/final_checkpoints/adapter_model.safetensors")
    once = final.read_bytes()
    run("--max_steps", "4", "--lr_scheduler_type", "constant", "--output_dir", "whole",
        "--resume_from_checkpoint", "latest")  # fmt: skip
    assert final.read_bytes() == once != before
    figures = load_run_config("whole/final_checkpoints")["figures"]
    assert figures["loss"] > 0 and "train_loss" not in figures
    assert {path.name for path in Path("whole").glob("checkpoint-*")} == {
        "checkpoint-2", "checkpoint-4"
    }  # fmt: skip


def test_a_save_that_is_killed_over_an_earlier_run_s_is_not_complete(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_checkpoint("latest", "results") == "results/checkpoint-3"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(SquadTrainer, "_save_optimizer_and_scheduler", killed)
        run("--learning_rate", "3e-3")
    assert find_checkpoint("latest", "results") == "results/checkpoint-3"
    assert not Path("results/checkpoint-2/trainer_state.json").exists()


def test_resume_anyway_needs_a_checkpoint() -> None:
    with pytest.raises(SystemExit, match="--resume_anyway needs --resume_from_checkpoint"):
        run("--resume_anyway")


def test_rows_that_come_out_otherwise_are_refused(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as on a machine where the attention takes no mask of a tree
    monkeypatch.setattr(
        "llama_squad.training.setup.check_shared_contexts", lambda *_: "as the test wants it"
    )
    with pytest.raises(
        SystemExit, match="rows: 'shared contexts .*' in the checkpoint, 'plain batches' now"
    ):
        run("--resume_from_checkpoint", FROM)


def without_record(checkpoint: str) -> None:
    """Take the record out of a checkpoint."""
    path = Path(checkpoint, RUN_CONFIG)
    content = json.loads(path.read_text(encoding="utf-8"))
    del content[RUN_RECORD]
    path.write_text(json.dumps(content), encoding="utf-8")


def test_a_checkpoint_without_a_record(
    begun: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_record(FROM)
    assert "it does not say what it was made with" in refused(monkeypatch)
    with pytest.raises(SystemExit, match="do not fit this model: .*another .*--lora_r"):
        run("--resume_from_checkpoint", FROM, "--resume_anyway", "--lora_r", "8")
    capsys.readouterr()
    run("--resume_from_checkpoint", FROM, "--resume_anyway", "--output_dir", "more")
    assert "it does not say what it was made with" in capsys.readouterr().out
    assert Path("more/checkpoint-3").is_dir()


def test_the_optimizer_s_saved_rate_wins() -> None:
    """Why another rate is refused even with ``--resume_anyway``: it would do nothing."""
    train = encoded_dataset(make_records(4, [1])).select_columns(["input_ids", "labels"])

    def last_rate(rate: float, steps: int, checkpoint: str | None) -> float:
        trainer = make_trainer(
            tiny_model(), train, Path("results"), max_steps=steps, logging_steps=1,
            save_strategy="steps", save_steps=1, learning_rate=rate, optim="adamw_torch",
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        return [e["learning_rate"] for e in trainer.state.log_history if "loss" in e][-1]

    assert last_rate(1e-3, 1, None) == 1e-3
    assert last_rate(1e-4, 2, "results/checkpoint-1") == 1e-3
