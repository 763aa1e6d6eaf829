"""The training stage: where the loss falls, what moves, what is saved, and what is refused."""

import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
import yaml
from helpers import (
    collator,
    dataset_folder,
    encode_paragraphs,
    encoded_dataset,
    flatten,
    make_records,
    make_trainer,
    model_folder,
    tiny_model,
    tiny_tokenizer,
    training_flags,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftConfig, PeftModel
from trl import SFTConfig

import train_llama_squad
from llama_squad import modeling, weights
from llama_squad.answers import format_answer
from llama_squad.arguments import CreateArguments, ModelArguments, TrainArguments
from llama_squad.config import RUN_CONFIG, load_run_config, parse_stage
from llama_squad.data import load_squad, write_dataset
from llama_squad.encoding import IGNORE, ChatEncoder
from llama_squad.folders import check_weights
from llama_squad.processes import is_sharded
from llama_squad.prompts import build_messages, gold_answer
from llama_squad.training import publishing
from llama_squad.training.arguments import SquadSFTConfig
from llama_squad.training.examples import encode_dataset
from llama_squad.training.merge_error import Sample
from llama_squad.training.packing import group_paragraphs, row_dataset
from llama_squad.training.setup import make_validation, prepare_model
from llama_squad.training.trainer import SeededByLength, SquadTrainer, answer_loss

pytestmark = pytest.mark.usefixtures("offline")

EXAMPLES = flatten(encode_paragraphs(make_records(2, [2])))
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
}  # 4-bit blocks are of 64 weights


# The loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_unsupervised_positions_get_no_gradient(shared: bool) -> None:
    model = tiny_model()
    states: list[torch.Tensor] = []

    def keep_gradient(module: Any, inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        states.append(output)

    # what the vocabulary's matrix reads: the logits of a position depend on it alone
    model.model.norm.register_forward_hook(keep_gradient)
    batch = collator()([{"paragraphs": [EXAMPLES[:2]]}] if shared else [EXAMPLES[0]])
    answer_loss(model, batch)[0].backward()
    supervised = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE) != IGNORE
    gradient = states[0].grad
    assert gradient is not None
    assert (gradient[~supervised] == 0).all()
    assert (gradient[supervised].abs().sum(-1) > 0).all()
    assert 0 < supervised.sum() < supervised.numel() / 3


def test_loss_on_literal_logits() -> None:
    class Literal:
        """A model of vocabulary 3 that finds token 1 twice as likely as 0 and as 2."""

        def __call__(self, logits_to_keep: torch.Tensor, **inputs: Any) -> Any:
            assert logits_to_keep.tolist() == [[False, True, True, False]]
            assert "labels" not in inputs
            logits = torch.tensor([1.0, 2.0, 1.0]).log().repeat(2, 1)
            return type("Output", (), {"logits": logits})

    batch = {
        "input_ids": torch.tensor([[0, 0, 1, 2]]),
        "labels": torch.tensor([[IGNORE, IGNORE, 1, 2]]),
    }
    loss, right, count = answer_loss(Literal(), batch)
    assert loss.item() == pytest.approx(-torch.tensor([0.5, 0.25]).log().sum().item())
    assert (right.item(), count.item()) == (1, 2)
    smooth, right, count = answer_loss(Literal(), batch, 0.3)
    mean = -torch.tensor([0.25, 0.5, 0.25]).log().mean()  # over the vocabulary
    assert smooth.item() == pytest.approx((0.7 * loss + 0.3 * 2 * mean).item())
    assert (right.item(), count.item()) == (1, 2)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_mixtures_of_experts_share_contexts(architecture: str, tmp_path: Path) -> None:
    """Their balancing loss, which TRL asks for, takes no mask of rows that share contexts."""
    model = tiny_model(architecture, output_router_logits=architecture == "mixtral")
    train = row_dataset(encoded_dataset(make_records(2, [2])), [[[0, 1]], [[2, 3]]])
    trainer = make_trainer(model, train, tmp_path, per_device_train_batch_size=1)
    assert model.config.router_aux_loss_coef  # or nothing is tried
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
    assert model.config.output_router_logits is False  # which would be saved


def test_the_order_by_length_is_one_of_seed_and_epoch() -> None:
    lengths = [7, 3, 9, 1, 5, 2, 8, 4] * 4
    one, other = (SeededByLength(4, lengths, seed=3) for _ in range(2))
    orders = []
    for epoch in range(2):
        one.set_epoch(epoch)
        orders.append(list(one))
        torch.rand(1)  # the random state of a run that goes on is another
    other.set_epoch(1)
    assert list(other) == orders[1] != orders[0]
    assert sorted(orders[1]) == list(range(len(lengths)))
    assert list(SeededByLength(4, lengths, seed=4)) != orders[0]


def test_plain_batches_are_resumed_in_their_order(tmp_path: Path) -> None:
    train = encoded_dataset(make_records(12, [1])).select_columns(["input_ids", "labels", "length"])

    def run(steps: int, checkpoint: str | None = None) -> list[list[list[int]]]:
        """Train in epochs of three steps; return the ids of each step."""
        trainer = make_trainer(
            tiny_model(), train, tmp_path, max_steps=steps, per_device_train_batch_size=4,
            save_strategy="steps", save_steps=4, train_sampling_strategy="group_by_length",
        )  # fmt: skip
        taken, compute_loss = [], trainer.compute_loss

        def keep(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            taken.append(inputs["input_ids"].tolist())
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = keep
        torch.manual_seed(len(checkpoint or ""))
        trainer.train(resume_from_checkpoint=checkpoint)
        return taken

    whole = run(8)
    assert len(whole) == 8
    assert run(8, str(tmp_path / "checkpoint-4")) == whole[4:]


def test_an_epoch_is_set_where_accelerate_does_not_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several processes that skip batches wrap the sampler too deep for it."""
    train = encoded_dataset(make_records(12, [1])).select_columns(["input_ids", "labels", "length"])
    monkeypatch.setattr("accelerate.data_loader.DataLoaderShard.set_epoch", lambda *_: None)
    trainer = make_trainer(
        tiny_model(), train, tmp_path, max_steps=6, per_device_train_batch_size=4,
        train_sampling_strategy="group_by_length",
    )  # fmt: skip
    orders, draw = [], SeededByLength.__iter__

    def keep(self: Any) -> Any:
        orders.append(list(draw(self)))
        return iter(orders[-1])

    monkeypatch.setattr(SeededByLength, "__iter__", keep)
    trainer.train()
    assert len(orders) == 2
    assert orders[0] != orders[1]


def test_label_smoothing_leaves_the_counts_true(tmp_path: Path) -> None:
    train = encoded_dataset(make_records(4, [1])).select_columns(["input_ids", "labels"])
    logs = []
    for smoothing in (0.0, 0.2):
        trainer = make_trainer(
            tiny_model(), train, tmp_path, label_smoothing_factor=smoothing, logging_steps=1,
            per_device_train_batch_size=2,
        )  # fmt: skip
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[0]["num_tokens"] == logs[1]["num_tokens"] == sum(map(len, train[:2]["input_ids"]))
    assert logs[0]["mean_token_accuracy"] == logs[1]["mean_token_accuracy"]
    assert logs[0]["loss"] != logs[1]["loss"]
    assert "tokens_saved" in logs[1]


@pytest.mark.parametrize("shared", [False, True])
def test_accumulation_gives_the_same_weights(shared: bool, tmp_path: Path) -> None:
    encoded = encoded_dataset(make_records(4, [1]))  # replies of different lengths
    train = encoded.select_columns(["input_ids", "labels"])
    if shared:
        train = row_dataset(encoded, [[p.examples] for p in group_paragraphs(encoded, None)])
    weights = []
    for batch, steps in ((1, 4), (4, 1)):
        model = tiny_model()
        trainer = make_trainer(
            model, train, tmp_path,
            per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
        )  # fmt: skip
        trainer.train()
        weights.append({n: p.detach() for n, p in trainer.model.named_parameters()})
    start = dict(tiny_model().named_parameters())
    moved = max(float((w - start[n]).abs().max().detach()) for n, w in weights[0].items())
    gap = max(float((w - weights[1][n]).abs().max()) for n, w in weights[0].items())
    assert moved > 1e-2
    assert gap < 1e-6


# 4-bit -----------------------------------------------------------------------------------------


def quantized(folder: Path) -> tuple[Any, ModelArguments]:
    """Load a tiny model in 4 bits with a new adapter, as the stage does."""
    model_args = ModelArguments(model_name=model_folder(folder, **WIDE))
    encoder = ChatEncoder(tiny_tokenizer())
    torch.manual_seed(0)
    args = TrainArguments(lora_r=4, lora_dropout=0.0)
    return prepare_model(args, model_args, encoder), model_args


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs")
@pytest.mark.parametrize("able", [True, False])
def test_4_bits_compute_in_bfloat16_where_the_cpu_does(
    able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU that has no instructions for it takes 19 times as long as in float32, one layer measured."""
    monkeypatch.setattr(modeling, "cpu_multiplies_bfloat16", functools.partial(bool, able))
    model, _ = quantized(tmp_path)
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    expected = torch.bfloat16 if able else torch.float32
    assert len(layers) == 2 * 7 and {m.compute_dtype for m in layers} == {expected}


def test_float32_adapters_move_at_the_default_rate(tmp_path: Path) -> None:
    model, _ = quantized(tmp_path)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    assert len(start) == 2 * 7 * 2
    examples = encoded_dataset(make_records(4, [2])).select_columns(["input_ids", "labels"])
    trainer = make_trainer(
        model, examples, tmp_path, per_device_train_batch_size=2, max_steps=4,
        optim="adamw_torch", learning_rate=SquadSFTConfig().learning_rate,
    )  # fmt: skip
    trainer.train()
    for name, weight in trainer.model.named_parameters():
        if "lora_" in name:
            assert weight.dtype == torch.float32, name
            step = (weight.detach() - start[name]).abs()
            assert 0 < step.max() < 1e-5, name
            assert (step > 0).float().mean() > 0.5, name  # in bfloat16 next to none of A's moves


def test_an_evaluation_does_not_break_4_bit_training(tmp_path: Path) -> None:
    model, _ = quantized(tmp_path)
    with torch.no_grad():  # B is zero at first, and nothing would reach A
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    batch = collator()([EXAMPLES[0]])

    def gradients() -> torch.Tensor:
        model.zero_grad()
        answer_loss(model, batch)[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    before = gradients()
    assert before.norm() > 0
    model.eval()
    with torch.no_grad():
        answer_loss(model, batch)
        model.generate(input_ids=batch["input_ids"][:, :20], max_new_tokens=2, do_sample=False)
    model.train()
    assert torch.nn.functional.cosine_similarity(before, gradients(), dim=0) > 0.9999


# The stage from end to end -----------------------------------------------------------------------


def stage_flags(folder: Path, **model: Any) -> list[str]:
    """Make a dataset and a model, and return the flags of a short run on them."""
    return training_flags(
        folder, "--lora_r", "4", "--per_device_train_batch_size", "4", "--max_steps", "3",
        "--logging_steps", "1", "--save_strategy", "no",
        val=make_records(2, [2], seed=5), **model,
    )  # fmt: skip


@pytest.mark.slow
def test_merge_and_push(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = stage_flags(tmp_path, **WIDE)
    train_llama_squad.main(
        [*flags, "--merge_and_push", "--learning_rate", "3e-2", "--eval_steps", "3"]
    )
    said = capsys.readouterr().out
    assert "Not pushed to the Hub: no --hub_model_id was given" in said
    assert "Shared contexts checked on" in said
    final, merged = Path("results/final_checkpoints"), Path("results/final_merged_checkpoint")

    base = modeling.load_model(ModelArguments(model_name=flags[1]), quantize=True)
    base.dequantize()
    ids = collator()(EXAMPLES[:1])["input_ids"]
    with torch.no_grad():
        plain = base(ids).logits
        expected = PeftModel.from_pretrained(base, str(final)).eval()(ids).logits
        found = modeling.load_model(ModelArguments(model_name=str(merged)))(ids).logits
    assert (expected - plain).abs().max() > 0.1, "the adapter does nothing"
    # the merged weights are kept in the type of the base
    assert (found - expected).abs().max() < 0.02 * (expected - plain).abs().max()

    saved = load_run_config(final)
    assert saved["train"]["lora_r"] == 4
    assert saved["model"]["model_name"] == flags[1]
    assert saved["trainer"]["learning_rate"] == 0.03
    assert saved["trainer"]["per_device_train_batch_size"] == 4  # as asked, not as laid out
    assert saved["prompt"] == "single_turn"
    assert set(saved["versions"]) >= {"torch", "trl", "peft"}
    assert {"eval_loss", "eval_exact_match", "eval_valid_json"} <= set(saved["figures"])
    card = (final / "README.md").read_text()
    assert "base_model:" not in card  # a folder is nothing to the Hub
    assert "| eval_exact_match |" in card
    assert "QLoRA (r=4, 4-bit nf4)" in card
    assert (final / "tokenizer.json").is_file()
    assert (merged / "tokenizer.json").is_file()
    kept = load_run_config(merged)
    assert kept.pop("merge")["questions"] == 4  # all of the validation split
    assert kept == saved


@pytest.mark.slow
def test_training_goes_on_from_an_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = stage_flags(tmp_path)
    held = ["--no_quantize", "--dtype", "bfloat16"]
    train_llama_squad.main([*flags, *held, "--lora_r", "3", "--learning_rate", "1e-3"])
    first = tmp_path / "results" / "final_checkpoints"
    base, flags = flags[1], without_lora(flags)
    on = [*flags, "--from_adapter", str(first), "--output_dir", str(tmp_path / "on")]
    before = tensors(first)
    train_llama_squad.main([*on, "--learning_rate", "0"])
    second = tmp_path / "on" / "final_checkpoints"
    assert tensors(second).keys() == before.keys()
    assert all(torch.equal(tensors(second)[name], tensor) for name, tensor in before.items())
    kept = load_run_config(second)
    assert kept["train"]["lora_r"] == 3
    # the base is held as it was: on another one, in 4 bits, it would not begin where it ended
    assert (kept["train"]["quantize"], kept["model"]["dtype"]) == (False, "bfloat16")
    assert kept["resume"]["adapter"] == weights.weights_digest(str(first))
    assert weights.saved_settings(str(second))["model_name"] == str(tmp_path / "model")
    train_llama_squad.main([*on, "--learning_rate", "1e-3"])
    moved = [not torch.equal(tensors(second)[name], tensor) for name, tensor in before.items()]
    assert any(moved)
    assert all(torch.equal(tensors(first)[name], tensor) for name, tensor in before.items())
    # of an adapter that was trained with another chat template, that
    template = tiny_tokenizer().chat_template + "{# its own #}"
    (first / "chat_template.jinja").write_text(template)
    train_llama_squad.main([*on, "--learning_rate", "0"])
    assert (second / "chat_template.jinja").read_text() == template
    for more, message in (
        (["--lora_r", "4"], "leave out --lora_r"),
        (["--full_parameters"], "leave out --full_parameters"),
        (["--output_dir", str(first.parent)], "would replace by its own result"),
        (["--from_adapter", "results/none"], "no folder results/none"),
        (["--from_adapter", base], "is a whole model, and no adapter: give it by --model_name"),
    ):
        with pytest.raises(SystemExit) as ended:
            train_llama_squad.main([*on, *more])
        assert message in f"{ended.value}{capsys.readouterr().err}"


def test_an_adapter_goes_on_with_its_own_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = stage_flags(tmp_path)
    train_llama_squad.main([*flags, "--max_steps", "1"])
    flags = without_lora(flags)
    data = dataset_folder(tmp_path / "other", make_records(2, [2]), prompt="multi_turn")
    with pytest.raises(SystemExit):
        train_llama_squad.main([*flags, "--dataset_name", data, "--output_dir", "on",
                                "--from_adapter", "results/final_checkpoints"])  # fmt: skip
    assert "create the dataset anew with --prompt single_turn" in capsys.readouterr().err
    data = dataset_folder(tmp_path / "third", make_records(2, [2]), system_prompt="Be brief.")
    with pytest.raises(SystemExit):
        train_llama_squad.main([*flags, "--dataset_name", data, "--output_dir", "on",
                                "--from_adapter", "results/final_checkpoints"])  # fmt: skip
    assert "has the system_prompt 'Be brief.', and results/" in capsys.readouterr().err


def test_a_prompt_without_numbers_ends_no_training(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """In float16 one validation question may overflow: there are no answers then, and no end."""
    val = make_records(3, [1])
    data = load_squad(dataset_folder(tmp_path, make_records(1, [1]), val))
    encoder = ChatEncoder(tiny_tokenizer())
    first, *others = encoder.encode_prompts(
        [build_messages(record, answer=False) for record in data["val"]]
    )
    model = tiny_model()
    # nor the check of the first prompt, which puts id - 1 in the place of ids, may meet it
    token = next(t for t in others[-1] if not {t, t + 1} & {*first})
    model.get_input_embeddings().weight.data[token] = float("inf")
    config = SquadSFTConfig(report_to="none", per_device_eval_batch_size=1)
    validate = make_validation(config, data, str(tmp_path / "dataset"), encoder)
    assert validate is not None and validate(model) == {}
    assert "only their loss: the model gives logits that are no numbers" in capsys.readouterr().out
    config.metric_for_best_model = "eval_exact_match"  # which the library insists on
    assert math.isnan(validate(model)["exact_match"])
    assert "only their loss: the model gives logits that are no numbers" in capsys.readouterr().out


def without_lora(flags: list[str]) -> list[str]:
    """Leave out what an adapter brings: its base, which comes first, and its rank."""
    at = flags.index("--lora_r")
    return flags[2:at] + flags[at + 2 :]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_without_cuda_training_runs_on_the_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch was built for, and on a Mac, too: the weights are loaded there."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device(kind))
    args = SquadSFTConfig(report_to="none", bf16=True)
    assert args.use_cpu
    assert args.device == torch.device("cpu")


def test_a_gpu_that_emulates_bfloat16_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Torch says that a T4 supports bfloat16: it emulates it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for able in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, able=able:
            including_emulation or able,
        )  # fmt: skip
        modeling.choose_device()
        assert ("--dtype float16" in capsys.readouterr().err) is not able
    for dtype in ("float16", "auto"):
        arguments = ModelArguments(dtype=dtype)
        options = modeling._load_options(arguments, True, "cuda:0", sharded=False)
        expected = torch.float16 if dtype == "float16" else torch.bfloat16
        assert options["quantization_config"].bnb_4bit_compute_dtype == expected


@pytest.mark.parametrize("sharded", [True, False])
def test_sharded_weights_are_placed_by_what_shards_them(
    sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    if sharded:  # known before the trainer, which loads after the model, says so
        monkeypatch.setattr(SFTConfig, "__post_init__", lambda self: None)
        monkeypatch.setattr("llama_squad.training.preflight.check_packages", lambda _: None)
        SquadSFTConfig(report_to="none", fsdp="full_shard")
    assert is_sharded() is sharded
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    options = modeling._load_options(ModelArguments(), True, None, sharded)
    assert ("device_map" in options) is not sharded
    storage = options["quantization_config"].bnb_4bit_quant_storage
    assert storage == (torch.bfloat16 if sharded else torch.uint8)
    args = SimpleNamespace(eval_strategy="steps", process_index=0)
    if sharded:
        assert make_validation(args, {"val": []}, "nowhere", None) is None  # type: ignore[arg-type]


def small_trainer() -> Any:
    """Make a trainer on a tiny model that writes to results; it does not train."""
    examples = encoded_dataset(make_records(2, [1])).select_columns(["input_ids", "labels"])
    return make_trainer(tiny_model(), examples, Path("results"))


def test_a_result_takes_the_place_of_the_whole_earlier_one(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, merged = Path("results/final_checkpoints"), Path("results/final_merged_checkpoint")
    for name in ("adapter_config.json", "adapter_model.safetensors", "na_prob_thresh.json"):
        final.mkdir(parents=True, exist_ok=True)
        (final / name).write_text("{}")
    merged.mkdir()
    (merged / "config.json").write_text("{}")
    (final.parent / ".final_checkpoints.new").mkdir()
    (final.parent / ".final_checkpoints.new" / "left").touch()  # by a killed run
    trainer = small_trainer()
    full = TrainArguments(full_parameters=True)
    settings = publishing.run_settings(full, ModelArguments(), trainer.args.to_dict())

    def full_disk(*_: Any) -> str:
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(publishing, "model_card", full_disk)  # the last file of all
        with pytest.raises(OSError, match="no space left"):
            publishing.save_final(trainer, settings)
    assert (final / "na_prob_thresh.json").exists()
    assert not (final / "config.json").exists()

    assert publishing.save_final(trainer, settings) == final
    names = {path.name for path in final.iterdir()}
    assert names >= {"config.json", "model.safetensors", "llama_squad.json", "README.md"}
    assert not names & {"adapter_config.json", "adapter_model.safetensors", "na_prob_thresh.json"}
    assert "left" not in names
    assert [path.name for path in final.parent.iterdir()] == ["final_checkpoints"]
    assert f"Removed {merged}" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_save_one_result(tmp_path: Path) -> None:
    final = Path("results/final_checkpoints")
    final.mkdir(parents=True)
    (final / "model.safetensors").write_text("stale")
    root = Path(modeling.__file__).parents[1]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"),
            str(root / "train_llama_squad.py"), *stage_flags(tmp_path), "--no_quantize",
            *("--merge_and_push", "--eval_strategy", "no"),
        ],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(f"Saved {final}.") == 1
    names = {path.name for path in final.iterdir()}
    assert names >= {"adapter_model.safetensors", "tokenizer.json", RUN_CONFIG, "README.md"}
    assert "model.safetensors" not in names
    kept = {path.name for path in final.parent.iterdir()}
    assert kept == {"final_checkpoints", "final_merged_checkpoint"}


@pytest.mark.parametrize("name", ["final_checkpoints", "final_merged_checkpoint", "checkpoint-500"])
def test_a_run_does_not_replace_its_own_base(name: str, tmp_path: Path) -> None:
    data = dataset_folder(tmp_path, make_records(1, [2]))
    Path("results").mkdir()
    Path(model_folder(tmp_path)).rename(Path("results") / name)
    with pytest.raises(SystemExit, match="give another --output_dir"):
        train_llama_squad.main(["--model_name", f"results/{name}/", "--dataset_name", data])


def test_card_names_what_the_hub_knows(tmp_path: Path) -> None:
    asked = {"learning_rate": 1.0}

    def header(model: str) -> dict[str, Any]:
        model_args = ModelArguments(model_name=model)
        settings = {"train": TrainArguments(), "model": model_args, "trainer": asked}
        return yaml.safe_load(publishing.model_card(settings, {}).split("---\n")[1])

    common = {
        "library_name": "peft",
        "pipeline_tag": "question-answering",
        "tags": ["squad", "question-answering", "trl", "sft"],
    }
    assert header("someone/base") == common | {"base_model": "someone/base"}
    assert header(str(tmp_path)) == common


def test_the_card_of_an_activated_adapter_says_how_it_acts() -> None:
    """PEFT by itself would let it act on all tokens."""

    def card(**train: Any) -> str:
        settings = {"train": TrainArguments(**train), "model": ModelArguments()}
        return publishing.model_card(settings | {"trainer": {"learning_rate": 1.0}}, {})

    assert "it must act from the context of its task on alone" in card(alora_from="context")
    assert "must act" not in card()
    assert "must act" not in card(alora_from="context", full_parameters=True)


def test_push_without_a_token(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = SquadSFTConfig(hub_model_id="someone/model", report_to="none")
    folder = tmp_path / "final"
    folder.mkdir()
    full = TrainArguments(full_parameters=True)
    publishing.merge_and_push(folder, full, ModelArguments(), args, Sample([], 0))
    said = capsys.readouterr()
    assert "Not pushed to someone/model: no token" in said.err
    assert "hf auth login" in said.err
    assert "no adapter to merge" in said.out


def test_show_mask_prints_the_trained_tokens_in_green(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    records = make_records(2, [2])
    data = dataset_folder(tmp_path, records)
    model_folder(tmp_path)
    train_llama_squad.main(["--model_name", "model", "--dataset_name", data, "--show_mask", "3"])
    said = capsys.readouterr().out
    green = re.findall(r"\033\[1;30;42m(.*?)\033\[0m", said, flags=re.DOTALL)
    assert green == [format_answer(gold_answer(r)) + "<|eot_id|>" for r in records[:3]]
    plain = re.sub(r"\033\[[\d;]*m", "", said)
    for record in records[:3]:
        assert build_messages(record)[1]["content"] in plain
    assert not Path("results").exists()


def test_show_mask_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--show_mask .*at least 0, not -1"):
        train_llama_squad.main(["--show_mask", "-1"])
    test = str(tmp_path / "test")
    write_dataset({"test": make_records(1, [2])}, CreateArguments(dataset_name=test))
    with pytest.raises(SystemExit, match="has no train split, only test: build it"):
        train_llama_squad.main(["--show_mask", "1", "--dataset_name", test])


def test_examples_that_are_too_long_are_dropped_and_counted(capsys: pytest.CaptureFixture) -> None:
    from datasets import Dataset, DatasetDict

    records = [{**r, "messages": build_messages(r)} for r in make_records(8, [2])]
    encoder = ChatEncoder(tiny_tokenizer())
    lengths = [len(e["input_ids"]) for e in encoder.encode([r["messages"] for r in records])]
    limit = sorted(lengths)[10]
    kept = sum(length <= limit for length in lengths)
    assert 0 < kept < 16
    dataset = DatasetDict(train=Dataset.from_list(records))
    encoded = encode_dataset(dataset, encoder, limit)["train"]
    assert len(encoded) == kept
    assert max(encoded["length"]) <= limit
    assert all(labels[-2:] != [IGNORE, IGNORE] for labels in encoded["labels"])
    said = capsys.readouterr().out
    assert f"train: {16 - kept} of 16 examples are longer than {limit} tokens" in said
    with pytest.raises(ValueError, match="no example of the train split fits in 20 tokens"):
        encode_dataset(dataset, encoder, 20)


# Flags -----------------------------------------------------------------------------------------


def parse(*flags: str) -> tuple[Any, ...]:
    """Parse training flags."""
    types = (TrainArguments, ModelArguments, SquadSFTConfig)
    return parse_stage("train", types, list(flags))


@pytest.mark.parametrize(
    ("flag", "value", "instead"),
    [
        ("--packing", "True", "--share_context"),
        ("--assistant_only_loss", "True", "where the loss falls"),
        ("--completion_only_loss", "True", "where the loss falls"),
        ("--chat_template_path", "x.jinja", "--chat_template FILE"),
        ("--packing_strategy", "wrapped", "--row_tokens"),
        ("--shuffle_dataset", "True", "--train_sampling_strategy"),
        ("--dataset_num_proc", "2", "on all cores already"),
        ("--loss_type", "dft", "negative log-likelihood of the answer's tokens"),
        ("--truncation_mode", "keep_end", "left out, never cut"),
        ("--trust_remote_code", "True", "never run"),
        ("--hub_strategy", "all_checkpoints", "the final folder alone"),
        ("--pad_token", "x", "attention mask"),
        ("--router_aux_loss_coef", "0.1", "the answer's tokens alone"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(
    flag: str, value: str, instead: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(flag, value)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"{flag} does nothing here" in said
    assert instead in said


def test_masks_are_not_counted_for_tokens() -> None:
    with pytest.raises(ValueError, match="num_tokens in the log counts tokens"):
        SquadSFTConfig(report_to="none", include_num_input_tokens_seen="non_padding")


def test_zero_3_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3 is not supported: take ZeRO-2, or FSDP"):
        SquadSFTConfig(report_to="none")


def test_the_rate_is_a_number_in_the_file_and_on_the_command_line() -> None:
    assert parse()[2].learning_rate == 2e-7
    assert parse("--learning_rate=1e-6")[2].learning_rate == 1e-6
    for name in ("max_seq_length", "max_length"):  # a flag's other name is the file's, too
        Path("config.yaml").write_text(f"train:\n  learning_rate: 1e-6\n  {name}: 512\n")
        assert parse()[2].learning_rate == 1e-6
        assert parse()[2].max_length == 512
    assert parse("--max_seq_length", "1024")[2].max_length == 1024


@pytest.mark.parametrize(
    "flags",
    [
        ["--use_dora", "True"],
        ["--lora-r=64"],  # the default, but asked for
        ["--quantize"],
        ["--bnb_4bit_quant_type", "nf4"],
    ],
)
def test_full_parameters_takes_no_adapter_flags(flags: list[str]) -> None:
    name = flags[0].split("=")[0].replace("-", "_").replace("__", "--")
    with pytest.raises(SystemExit, match=f"{name} would do nothing: leave out one"):
        train_llama_squad.main(["--full_parameters", *flags])


def test_full_parameters_takes_a_recipe_and_flags_that_agree() -> None:
    Path("config.yaml").write_text("train:\n  lora_r: 8\n  quantize: true\n")
    for flags in ([], ["--no_quantize"], ["--quantize", "False"], ["--use_dora=False"]):
        with pytest.raises(SystemExit, match="no dataset in 'nowhere'"):
            train_llama_squad.main(["--full_parameters", "--dataset_name=nowhere", *flags])


def test_one_type_to_compute_in(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        parse("--bf16", "--fp16")
    assert "--bf16 and --fp16 name two types" in capsys.readouterr().err
    assert parse("--bf16")[2].bf16
    assert parse("--fp16", "--bf16", "False")[2].fp16
    for able in (True, False):
        monkeypatch.setattr(
            "llama_squad.training.arguments.cpu_multiplies_bfloat16", functools.partial(bool, able)
        )
        assert (parse()[2].bf16, parse()[2].fp16) == (able, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        parse("--use_cpu")
    assert "--use_cpu does not hide the GPUs" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(SFTConfig, "__post_init__", lambda self: None)
    assert (parse()[2].bf16, parse()[2].fp16) == (True, False)
    assert parse("--fp16")[2].bf16 is False
    assert parse("--no_gradient_checkpointing", "--bf16=False")[2].bf16 is False


@pytest.mark.parametrize("shared", [True, False])
def test_rows_are_padded_to_a_multiple(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    plain = answer_loss

    def spy(model: Any, inputs: Any, *options: Any) -> Any:
        lengths.append(inputs["input_ids"].shape[1])
        return plain(model, inputs, *options)

    monkeypatch.setattr("llama_squad.training.trainer.answer_loss", spy)
    train_llama_squad.main(
        [*stage_flags(tmp_path), "--no_quantize", "--pad_to_multiple_of", "64", "--eval_strategy",
         "no", *["--no_share_context"] * (not shared)]
    )  # fmt: skip
    assert lengths
    assert all(length % 64 == 0 for length in lengths)


def test_a_wrong_setup_ends_with_a_message(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="no dataset in 'nowhere'"):
        train_llama_squad.main(["--dataset_name", "nowhere"])
    Path("config.yaml").write_text("train: {output_dir: null}")
    with pytest.raises(SystemExit, match="--output_dir is null: name a folder"):
        train_llama_squad.main([])


# Going on -----------------------------------------------------------------------------------


def test_num_tokens_go_on_after_a_resume() -> None:
    train = encoded_dataset(make_records(4, [1])).select_columns(["input_ids", "labels"])

    def num_tokens(steps: int, checkpoint: str | None) -> list[float]:
        trainer = make_trainer(
            tiny_model(), train, Path("results"), max_steps=steps, logging_steps=1,
            save_strategy="steps", save_steps=2, per_device_train_batch_size=1,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        return [e["num_tokens"] for e in trainer.state.log_history if "loss" in e]

    assert len(num_tokens(2, None)) == 2
    resumed = num_tokens(4, "results/checkpoint-2")
    lengths = [len(ids) for ids in train["input_ids"]]
    assert resumed == [sum(lengths[:n]) for n in (1, 2, 3, 4)]


# What trained weights bring ----------------------------------------------------------------------

TRAINED = {
    "prompt": "multi_turn",
    "system_prompt": "Be exact.",
    "train": {"reasoning_tokens": 4, "lora_r": 8},
}
BROUGHT = {"prompt": "multi_turn", "system_prompt": "Be exact.", "reasoning_tokens": 4, "filler": 0}


def adapter_folder(folder: Path, base: str) -> Path:
    """Write the two small files of an adapter."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": base})
    )
    (folder / RUN_CONFIG).write_text(json.dumps(TRAINED))
    return folder


def test_a_checkpoint_brings_its_settings(tmp_path: Path) -> None:
    examples = encoded_dataset(make_records(2, [1])).select_columns(["input_ids", "labels"])
    args = TrainArguments(full_parameters=True, reasoning_tokens=3)
    settings = publishing.run_settings(args, ModelArguments(), {}) | {"prompt": "multi_turn"}
    trainer = make_trainer(
        tiny_model(), examples, Path("results"), save_strategy="steps", save_steps=1,
        save_only_model=True, trainer=functools.partial(SquadTrainer, settings=settings),
    )  # fmt: skip
    trainer.train()
    brought = {"prompt": "multi_turn", "reasoning_tokens": 3, "filler": 0}
    name = "results/checkpoint-1"
    assert weights.saved_settings(name) == brought | {"model_name": name}
    assert weights.saved_settings(None, name) == brought


def test_settings_of_a_model_and_of_none(tmp_path: Path) -> None:
    assert weights.saved_settings(None) == {}
    assert weights.saved_settings(None, "someone/base") == {}
    assert weights.saved_settings(None, str(tmp_path)) == {}
    (tmp_path / RUN_CONFIG).write_text(json.dumps(TRAINED))
    assert weights.saved_settings(None, str(tmp_path)) == BROUGHT


def test_an_adapter_on_the_hub_brings_its_settings_and_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = adapter_folder(tmp_path / "hub", "someone/base")
    tiny_tokenizer().save_pretrained(hub)
    loaded = []

    def download(repository: str, name: str) -> str:
        assert repository == "someone/adapter"
        if not (hub / name).is_file():
            raise LocalEntryNotFoundError(name)
        return str(hub / name)

    def load(source: str) -> Any:
        loaded.append(source)
        return tiny_tokenizer()

    config = PeftConfig.from_pretrained(str(hub))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("peft.PeftConfig.from_pretrained", lambda name: config)
    monkeypatch.setattr(modeling.AutoTokenizer, "from_pretrained", load)
    arguments = ModelArguments(model_name="someone/base")
    brought = {"model_name": "someone/base"}
    assert weights.saved_settings("someone/adapter") == brought | BROUGHT
    modeling.load_tokenizer(arguments, "someone/adapter")
    (hub / RUN_CONFIG).unlink()
    (hub / "tokenizer_config.json").unlink()
    assert weights.saved_settings("someone/adapter") == brought
    modeling.load_tokenizer(arguments, "someone/adapter")
    assert loaded == ["someone/adapter", "someone/base"]


def test_a_whole_model_given_as_the_adapter_is_loaded(tmp_path: Path) -> None:
    other = model_folder(tmp_path)
    full = tmp_path / "full"
    tiny_model(seed=1, vocab_size=700).save_pretrained(full)
    arguments = ModelArguments(model_name=other)
    assert modeling.load_model(arguments, adapter_name=str(full)).config.vocab_size == 700
    assert weights.saved_settings(str(full)) == {"model_name": str(full)}
    (full / "model.safetensors").unlink()
    for call in (modeling.load_model, modeling.load_encoder):
        with pytest.raises(ValueError, match="full holds neither an adapter nor a model: train"):
            call(arguments, adapter_name=str(full))
    with pytest.raises(ValueError, match=r"holds no weights \(a copy that was stopped\?\): cure"):
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / "adapter_config.json").write_text("{}")
        (tmp_path / "copy" / "training_args.bin").write_text("")
        check_weights("--adapter_name", str(tmp_path / "copy"), "cure")
    with pytest.raises(ValueError, match="holds neither"):
        weights.saved_settings(str(full))


def test_a_relative_base_is_found_from_another_folder(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "adapter", "quickstart/tiny_llama")
    repository = Path(modeling.__file__).parents[1]
    found = weights.saved_settings(str(adapter))["model_name"]
    assert found == str(repository / "quickstart/tiny_llama")
    Path("quickstart/tiny_llama").mkdir(parents=True)  # the one here comes first
    assert weights.saved_settings(str(adapter))["model_name"] == "quickstart/tiny_llama"
    elsewhere = adapter_folder(tmp_path / "elsewhere", "someone/base")
    assert weights.saved_settings(str(elsewhere))["model_name"] == "someone/base"


def test_a_hub_that_could_not_be_asked_is_no_hub_without_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an adapter would be run as another one, unsaid: on each of its tokens, say."""
    status: list[Any] = [None]

    def fail(*_: Any) -> Any:
        cause = OSError("no network")
        cause.response = SimpleNamespace(status_code=status[0])  # type: ignore[attr-defined]
        raise LocalEntryNotFoundError("cannot reach it") from cause

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    assert weights.find_file("me/alora", RUN_CONFIG) is None  # HF_HUB_OFFLINE is set in the tests
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(
        ValueError, match="could not be asked whether me/alora has llama_squad.json"
    ):
        weights.find_file("me/alora", RUN_CONFIG)
    status[0] = 404  # of a mirror
    assert weights.find_file("me/alora", RUN_CONFIG) is None


def test_a_missing_attention_package_is_named(tmp_path: Path) -> None:
    arguments = ModelArguments(
        model_name=model_folder(tmp_path), attn_implementation="flash_attention_2"
    )
    with pytest.raises(ValueError, match="(?s)cannot load the model.*--attn_implementation sdpa"):
        modeling.load_model(arguments)


def test_a_model_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no connection\n\nsee a page")

    monkeypatch.setattr(modeling.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ValueError, match="no connection see a page. It is neither") as error:
        modeling.load_tokenizer(ModelArguments(model_name="nobody/nothing"))
    assert "\n" not in str(error.value)
