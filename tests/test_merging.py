"""Merging an adapter: what the rounding keeps, what is measured, the tokenizer, and secrets."""

import copy
import dataclasses
import functools
import json
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import bitsandbytes
import pytest
import torch
from helpers import (
    collator,
    encode_paragraphs,
    flatten,
    make_records,
    model_folder,
    tiny_model,
    tiny_tokenizer,
    training_flags,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import train_llama_squad
from llama_squad import merging, modeling, weights
from llama_squad.arguments import EvalArguments, ModelArguments, TrainArguments
from llama_squad.config import load_run_config
from llama_squad.evaluation import resolved_settings
from llama_squad.quantized import dequantize
from llama_squad.training import publishing
from llama_squad.training.arguments import SquadSFTConfig
from llama_squad.training.merge_error import MergeError, Sample
from llama_squad.training.setup import add_lora
from llama_squad.training.trainer import answer_loss

pytestmark = pytest.mark.usefixtures("offline")

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}  # 4-bit blocks are of 64
EXAMPLES = flatten(encode_paragraphs(make_records(3, [3])))


def adapter_on(model: Any, size: float, folder: Path, **settings: Any) -> Path:
    """Save an adapter whose B entries are of the given size."""
    torch.manual_seed(1)
    # Not "all-linear", of which PEFT makes suffixes as these only where a model has more layers.
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=layers, **settings)
    tuned = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
            if "trainable_tokens" in name:
                parameter.add_(size)
    tuned.save_pretrained(str(folder))
    tuned.unload()
    return folder


# The rounding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_leaves_what_the_type_can_hold(dtype: torch.dtype) -> None:
    literal = torch.tensor([0.0, 1.0, -1.0, 0.5, -2.0, 1.5, 2**-20])
    drawn = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    for exact in (literal, drawn):
        generator = torch.Generator().manual_seed(0)
        rounded = merging.round_stochastically(exact, dtype, generator)
        assert rounded.dtype == dtype
        assert torch.equal(rounded.float(), exact)


@pytest.mark.parametrize(
    ("dtype", "weight", "neighbours", "share"),
    [
        (torch.bfloat16, 1 + 2**-9, [1.0, 1 + 2**-7], 0.25),
        (torch.bfloat16, -1 - 2**-9, [-1 - 2**-7, -1.0], 0.75),
        (torch.bfloat16, 1 - 2**-10, [1 - 2**-8, 1.0], 0.75),  # below 1 the units are half as wide
        (torch.float16, 1 + 2**-12, [1.0, 1 + 2**-10], 0.25),
        (torch.float16, 1.25 * 2**-24, [2**-24, 2**-23], 0.25),  # subnormal
    ],
)
def test_rounding_is_as_likely_as_it_is_near(
    dtype: torch.dtype, weight: float, neighbours: list[float], share: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    rounded = merging.round_stochastically(torch.full((40_000,), weight), dtype, generator).float()
    assert rounded.unique().tolist() == neighbours
    assert (rounded == neighbours[1]).float().mean().item() == pytest.approx(share, abs=0.01)


# The merge -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_a_small_update_survives_in_bfloat16(size: float, tmp_path: Path) -> None:
    base = tiny_model(dtype=torch.bfloat16)
    weights = [p.detach().clone() for p in base.parameters()]
    adapter = adapter_on(base, size, tmp_path / "adapter")

    def load() -> Any:
        fresh = tiny_model(dtype=torch.bfloat16)
        for parameter, weight in zip(fresh.parameters(), weights, strict=True):
            parameter.data = weight.clone()
        return PeftModel.from_pretrained(fresh, str(adapter))

    layer = "model.layers.0.mlp.up_proj.weight"
    before = tiny_model(dtype=torch.bfloat16).get_parameter(layer).float()
    model = load()
    update = model.base_model.model.model.layers[0].mlp.up_proj.get_delta_weight("default")
    merged = merging.merge(model, torch.bfloat16)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    nearest = load().merge_and_unload().get_parameter(layer).float() - before
    kept = merged.get_parameter(layer).float() - before

    def slope(change: torch.Tensor) -> float:  # 1 where the whole update is there
        return float((change * update).sum() / (update * update).sum())

    lost = {1e-3: 0.5, 1e-4: 0.9}[size]  # rounding to nearest drops at least this share
    assert (nearest == 0).float().mean() > lost, "the update is no small one"
    sure = {1e-3: 0.3, 1e-4: 1.0}[size]  # of the noise of 1,536 weights
    assert abs(slope(kept) - 1) < sure
    again = merging.merge(load(), torch.bfloat16).get_parameter(layer)
    assert torch.equal(again, merged.get_parameter(layer))
    exact = merging.merge(load(), torch.float32)
    assert {p.dtype for p in exact.parameters()} == {torch.float32}
    difference = exact.get_parameter(layer) - before
    torch.testing.assert_close(difference, update, atol=1e-7, rtol=0)


def test_dora_and_reasoning_tokens_merge(tmp_path: Path) -> None:
    token = tiny_tokenizer().added_tokens_encoder["<|reserved_special_token_0|>"]
    ids = torch.tensor([[1, 20, token, token, 30]])
    for settings in ({"use_dora": True}, {"trainable_token_indices": [token]}):
        for tied in (False, True):
            base = tiny_model(tie_word_embeddings=tied)
            plain = base(ids).logits
            adapter = adapter_on(base, 0.1, tmp_path / "adapter", **settings)
            model = PeftModel.from_pretrained(tiny_model(tie_word_embeddings=tied), str(adapter))
            expected = model(ids).logits
            found = merging.merge(model, torch.float32)(ids).logits
            assert (expected - plain).abs().max() > 0.1
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_is_merged_for_use_in_float32_only(tmp_path: Path) -> None:
    name = model_folder(tmp_path, **WIDE)
    adapter = str(adapter_on(tiny_model(**WIDE), 0.1, tmp_path / "adapter"))
    apart = PeftModel.from_pretrained(tiny_model(**WIDE), adapter).eval()
    merged = modeling.load_model(ModelArguments(model_name=name), adapter_name=adapter).eval()
    assert not isinstance(merged, PeftModel)
    ids = collator()(EXAMPLES[:1])["input_ids"]
    torch.testing.assert_close(merged(ids).logits, apart(ids).logits, atol=1e-4, rtol=1e-4)
    half = ModelArguments(model_name=name, dtype="bfloat16")
    assert isinstance(modeling.load_model(half, adapter_name=adapter), PeftModel)
    four = modeling.load_model(ModelArguments(model_name=name), True, adapter)
    assert isinstance(four, PeftModel)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs")
@pytest.mark.parametrize("able", [True, False])
def test_the_base_of_a_4_bit_run_is_what_its_forward_computes_with(
    able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling, "cpu_multiplies_bfloat16", functools.partial(bool, able))
    args = ModelArguments(model_name=model_folder(tmp_path, **WIDE), dtype="float32")
    model: Any = modeling.load_model(args, quantize=True)
    layer = model.model.layers[0].mlp.up_proj
    identity = torch.eye(layer.in_features)
    with torch.no_grad():
        computed = layer(identity).T.clone()
    dequantize(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, computed.float())
    assert torch.equal(weight, weight.bfloat16().float()) is able


def test_a_model_saved_in_float32_is_used_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = model_folder(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert AutoConfig.from_pretrained(name).dtype == torch.float32
    assert modeling.weights_dtype(ModelArguments(model_name=name)) == torch.bfloat16
    (Path(name) / "llama_squad.json").write_text("{}")  # it was trained or merged here
    assert modeling.weights_dtype(ModelArguments(model_name=name)) == torch.float32
    asked = ModelArguments(model_name=name, dtype="bfloat16")
    assert modeling.weights_dtype(asked) == torch.bfloat16


@pytest.mark.parametrize("able", [True, False])
def test_a_cpu_that_multiplies_in_bfloat16_keeps_what_was_saved_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    whole, half = model_folder(tmp_path / "whole"), model_folder(tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    half_type = torch.bfloat16 if able else torch.float32
    for name, expected in ((whole, torch.float32), (half, half_type)):
        assert modeling.load_model(ModelArguments(model_name=name)).dtype == expected
    # a whole model takes the place of the base, in what a result file says of its type, too
    args = EvalArguments(adapter_name=whole)
    said = resolved_settings(args, ModelArguments(model_name=half))["dtype"]
    assert said == "float32"
    assert modeling.load_model(ModelArguments(model_name=half), adapter_name=whole).dtype == (
        torch.float32
    )


# What is measured ------------------------------------------------------------------------------


def test_a_merge_is_measured_in_each_way(tmp_path: Path) -> None:
    model_args = ModelArguments(model_name=model_folder(tmp_path, **WIDE), dtype="float32")
    adapter = adapter_on(tiny_model(**WIDE), 0.05, tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(adapter)
    sample = Sample.take(EXAMPLES, collator(), 5)
    assert sample.questions == 5
    rows = Sample.take(
        [{"paragraphs": [EXAMPLES[:3]]}, {"paragraphs": [EXAMPLES[3:6]]}], collator()
    )
    assert rows.questions == 6
    base = tiny_model(**WIDE)
    batch = collator()(EXAMPLES[:5])
    with torch.no_grad():
        expected, _, tokens = answer_loss(base, batch)
    for quantize in (False, True):
        for name in ("float32", "bfloat16"):
            args = TrainArguments(quantize=quantize, merged_dtype=name)
            output = tmp_path / f"{name}{quantize}"
            error = publishing.merge_adapter(args, model_args, adapter, output, sample)
            assert str(AutoConfig.from_pretrained(str(output)).dtype) == f"torch.{name}"
            assert (error.questions, error.dtype) == (5, name)
            assert error.base_shift > 0.05
            tolerance = 1e-4 if name == "float32" else 0.1 * error.base_shift
            assert error.merged_shift < tolerance
            assert error.merged_loss == pytest.approx(error.adapter_loss, abs=tolerance)
            if not quantize:
                assert error.base_loss == pytest.approx(expected.item() / tokens.item(), rel=1e-5)


def error_of(merged: float, adapter: float = 1.0, dtype: str = "bfloat16") -> MergeError:
    """Make a measurement whose base has a loss of 2."""
    return MergeError(64, dtype, 2.0, adapter, merged, 0.5, 0.25)


def test_what_is_said_of_a_merge() -> None:
    assert error_of(1.02).kept == pytest.approx(0.98)
    assert error_of(1.0199).warning() == ""
    assert error_of(0.99).warning() == ""  # better than the adapter
    assert error_of(1.03).warning() == (
        "Warning: the merge lost 3.0% of what the tuning gained: --merged_dtype float32 keeps it."
    )
    assert error_of(1.03, dtype="float32").warning().endswith("what the tuning gained.")
    assert error_of(2.5, adapter=2.0).kept is None
    assert error_of(2.5, adapter=2.0).warning() == ""
    assert error_of(1.03).table() == (
        "| on 64 questions | loss | mean absolute logit difference |\n|---|--:|--:|\n"
        "| base | 2.000000 | 0.500000 |\n| base + adapter | 1.000000 | 0 |\n"
        "| merged, in bfloat16 (97.00% kept) | 1.030000 | 0.250000 |"
    )


# The run ---------------------------------------------------------------------------------------

SECRET = "hf_thisTokenMustNotBeWrittenAnywhere"


def every_byte(folder: Path) -> dict[str, bytes]:
    """Return what the files of a folder hold, those within archives too."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path)] = path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    for name in archive.namelist():
                        found[f"{path}/{name}"] = archive.read(name)
    return found


class Hub:
    """The Hub as far as pushing goes: what came, and with which token."""

    pushed: ClassVar[list[tuple[str, str, str]]] = []
    branches: ClassVar[set[tuple[str, str]]] = set()

    def __init__(self, token: str = "") -> None:
        self.token = token

    def whoami(self, token: str) -> None:
        """Take every token."""

    def create_repo(self, name: str, **_: Any) -> Any:
        return SimpleNamespace(repo_id=name if "/" in name else f"someone/{name}")

    def create_branch(self, repo_id: str, branch: str, exist_ok: bool) -> None:
        self.branches.add((repo_id, branch))

    def upload_folder(self, repo_id: str, folder_path: str, revision: str | None) -> None:
        assert revision is None or (repo_id, revision) in self.branches
        self.pushed.append((repo_id, Path(folder_path).name, self.token))


def use_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put it in the place of the real one; of the trainer, which must upload nothing, too."""
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "pushed", [])
    trainers = SimpleNamespace(create_repo=Hub().create_repo)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: trainers)


def test_a_run_merges_measures_and_keeps_its_token_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch)
    flags = training_flags(
        tmp_path, "--lora_r", "4", "--per_device_train_batch_size", "4", "--max_steps", "2",
        "--save_steps", "1", "--learning_rate", "3e-2", "--no_quantize", "--merge_and_push",
        "--eval_strategy", "no", "--merged_dtype", "bfloat16", "--logging_steps", "1",
        "--report_to", "tensorboard", "--hub_model_id", "model", "--hub_token", SECRET,
        "--push_to_hub", "--hub_revision", "tried",
        val=make_records(2, [2], seed=5),
    )  # fmt: skip
    train_llama_squad.main(flags)
    assert Hub.pushed == [
        ("someone/model", "final_checkpoints", SECRET),
        ("someone/model-merged", "final_merged_checkpoint", SECRET),
    ]
    files = every_byte(tmp_path)
    bins = [name for name in files if name.endswith("training_args.bin")]
    assert len(bins) == 3  # two checkpoints and the final folder
    assert any("tfevents" in name for name in files)
    assert [name for name, content in files.items() if SECRET.encode() in content] == []

    said = capsys.readouterr().out
    final, merged = Path("results/final_checkpoints"), Path("results/final_merged_checkpoint")
    table = re.search(r"\| on 4 questions \|.*?\n\|---.*?\n(\| .*\n){3}", said)
    assert table
    card = (merged / "README.md").read_text()
    assert table.group() in card
    assert "library_name: transformers" in card
    assert "--model_name=FOLDER" in card
    assert "The merge" not in (final / "README.md").read_text()
    saved = load_run_config(merged)
    assert saved["merge"]["dtype"] == "bfloat16"
    assert {k: v for k, v in saved.items() if k != "merge"} == load_run_config(final)
    of_tokenizer = [p.name for p in final.iterdir() if "token" in p.name or "template" in p.name]
    assert set(of_tokenizer) >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in of_tokenizer:
        assert (merged / name).read_bytes() == (final / name).read_bytes(), name
    assert not list(merged.glob("adapter_*"))
    assert not (merged / "training_args.bin").exists()


def test_what_is_pushed_is_the_final_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the output folder, which may hold other runs, and does not say how to use the adapter."""
    use_hub(monkeypatch)
    flags = training_flags(
        tmp_path, "--lora_r", "4", "--max_steps", "1", "--save_steps", "1", "--no_quantize",
        "--eval_strategy", "no", "--push_to_hub", "--hub_model_id", "model", "--hub_token", SECRET,
    )  # fmt: skip
    train_llama_squad.main(flags)
    assert Hub.pushed == [("someone/model", "final_checkpoints", SECRET)]
    assert load_run_config("results/final_checkpoints")["prompt"] == "single_turn"
    assert not Path("results/README.md").exists()


def test_a_pickled_configuration_holds_no_token(tmp_path: Path) -> None:
    args = SquadSFTConfig(hub_token=SECRET, report_to="none")
    torch.save(args, tmp_path / "training_args.bin")
    assert args.hub_token == SECRET
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.hub_token is None
    assert loaded.learning_rate == args.learning_rate


def test_the_tokenizer_is_the_adapters_whatever_it_was_last_used_for(tmp_path: Path) -> None:
    model_args = ModelArguments(model_name=model_folder(tmp_path))
    adapter = adapter_on(tiny_model(), 0.1, tmp_path / "adapter")
    tokenizer = modeling.load_tokenizer(model_args)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=3)
    tokenizer.save_pretrained(adapter)
    sample = Sample.take(EXAMPLES, collator(), 1)
    output = tmp_path / "merged"
    publishing.merge_adapter(TrainArguments(quantize=False), model_args, adapter, output, sample)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (adapter / name).read_bytes(), name


# The base --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other", [{"hidden_size": 64}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}]
)
def test_an_adapter_on_a_base_it_does_not_fit_names_both(
    other: dict[str, Any], tmp_path: Path
) -> None:
    name = model_folder(tmp_path, **other)
    adapter = adapter_on(tiny_model(), 0.1, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "someone/base"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as refused:
        modeling.load_model(ModelArguments(model_name=name), adapter_name=str(adapter))
    assert str(refused.value) == (
        f"the adapter {adapter} was trained on someone/base and does not fit {name}: leave "
        "--model_name out, and the adapter brings its own base"
    )


def test_a_base_whose_sampling_flags_do_not_fit_can_be_saved(tmp_path: Path) -> None:
    """Loading takes a temperature without sampling, and saving would refuse it."""
    folder = Path(model_folder(tmp_path))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps(config | {"temperature": 0.9, "top_p": 0.6})
    )
    modeling.load_model(ModelArguments(model_name=str(folder))).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_a_base_that_was_saved_in_4_bits_is_not_merged_into(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
    args = ModelArguments(model_name=model_folder(tmp_path, **sizes), dtype="float32")
    base = modeling.load_model(args, quantize=True)
    base.save_pretrained(tmp_path / "bits")
    add_lora(base, TrainArguments(lora_r=2)).save_pretrained(str(tmp_path / "adapter"))
    saved = dataclasses.replace(args, model_name=str(tmp_path / "bits"))
    model: Any = modeling.load_model(saved, adapter_name=str(tmp_path / "adapter"))
    assert isinstance(model, PeftModel)
    kinds = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert kinds and not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in kinds)


def test_an_adapter_of_experts_is_merged(tmp_path: Path) -> None:
    """PEFT adapts their weights as parameters; their layers have no ``weight``."""
    base = tiny_model("qwen3_moe", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    with pytest.raises(ValueError, match="give --lora_dropout 0, or adapt attention alone"):
        add_lora(copy.deepcopy(base), TrainArguments(lora_dropout=0.1))
    model = add_lora(base, TrainArguments(lora_dropout=0.0, lora_r=4))
    assert model.peft_config["default"].target_parameters
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        apart = model(input_ids=ids).logits
        merged = merging.merge(model, torch.float32)(input_ids=ids).logits
    assert torch.allclose(apart, merged, atol=1e-4)


def test_weights_that_were_cut_off_are_named(tmp_path: Path) -> None:
    name = model_folder(tmp_path)
    adapter = adapter_on(tiny_model(), 0.1, tmp_path / "adapter")
    for folder, kind in ((adapter, "adapter"), (Path(name), "model")):
        file = next(folder.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match=f"cannot load the {kind} in {folder}: .* not fully"):
            modeling.load_model(ModelArguments(model_name=name), adapter_name=str(adapter))


def test_an_adapter_that_names_no_base_asks_for_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    args = ModelArguments(model_name=weights.saved_settings(str(tmp_path))["model_name"])
    with pytest.raises(ValueError, match="does not say what its base is: give it by --model_name"):
        modeling.load_encoder(args, adapter_name=str(tmp_path))


def test_an_adapter_on_another_base_that_fits_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    name = model_folder(tmp_path)
    adapter = adapter_on(tiny_model(), 0.1, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for base, said in (("someone/base", True), (name, False), ("model", False)):
        config["base_model_name_or_path"] = base
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        capsys.readouterr()
        modeling.load_model(ModelArguments(model_name=name), adapter_name=str(adapter))
        line = f"The adapter {adapter} was trained on {base}, and is used on {name}."
        assert (line in capsys.readouterr().err) == said
