"""The token tree: who may share contexts, and that those who do lose nothing by it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    collator,
    difference,
    encode_paragraphs,
    encoded_dataset,
    flatten,
    make_records,
    model_folder,
    tiny_model,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig

from llama_squad.arguments import ModelArguments, TrainArguments
from llama_squad.decoding.cache import check_tree
from llama_squad.lora import quicken
from llama_squad.modeling import load_model
from llama_squad.training.arguments import SquadSFTConfig
from llama_squad.training.packing import plan_rows, row_dataset
from llama_squad.training.setup import check_shared_contexts, lay_out
from llama_squad.tree import attention_windows, make_masks
from llama_squad.tree_check import (
    RowProbe,
    longest_shared,
    recurrent_layers,
    why_not_shared,
)

PARAGRAPHS = encode_paragraphs(make_records(2, [2, 3]))
PROMPT = PARAGRAPHS[0][0]["input_ids"][:120]
LONGEST = max(len(example["input_ids"]) for example in flatten(PARAGRAPHS))
MASKED = [torch.float32, torch.bfloat16]

MAMBA: dict[str, Any] = {
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "head_dim": 8,
}  # fmt: skip
MIXED = ["linear_attention", "full_attention"]
EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}
HYBRIDS: dict[str, dict[str, Any]] = {
    "olmo_hybrid": LINEAR | {"layer_types": MIXED, "pad_token_id": 0},
    "qwen3_next": LINEAR | EXPERTS | {"layer_types": MIXED, "moe_intermediate_size": 16},
    "qwen3_5_text": LINEAR | {"layer_types": MIXED},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": MAMBA | {"layer_types": MIXED, "num_local_experts": 0},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
              "num_experts": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
}  # fmt: skip
"""Hybrids that a tolerance let pass, at a size of their own."""

OTHERS = ["bamba", "zamba", "zamba2", "mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma",
          "xlstm", "minimax", "nemotron_h", "qwen3_5", "kimi_linear", "lfm2_moe", "bailing_hybrid",
          "zaya", "inkling_text", "lfm3"]  # fmt: skip


def tree_model(architecture: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """Make a tiny model of attention, experts or both; eager where it takes no other."""
    return tiny_model(architecture, dtype, **ATTENTION[architecture] | config)


def why_not(model: Any) -> str:
    """Ask the check on a row of PARAGRAPHS."""
    return why_not_shared(model, RowProbe(model, collator(), PARAGRAPHS))


@pytest.mark.parametrize("trained", [None, [5]])
def test_roundings_are_told_where_layers_compute_for_others(trained: list[int] | None) -> None:
    """LoRA's layers multiply by their base's weights themselves, a trained token's embeds alone."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", trainable_token_indices=trained
    )
    model = get_peft_model(tree_model("llama"), config)
    quicken(model)
    assert why_not(model) == ""


# Recurrent and convolutional layers ------------------------------------------------------------


@pytest.mark.parametrize("architecture", HYBRIDS)
def test_hybrids_are_refused_by_their_configuration(architecture: str) -> None:
    model = tiny_model(architecture, **HYBRIDS[architecture])
    assert "carry what one question says" in why_not(model)
    with pytest.raises(ValueError, match="carry what one question says into the next"):
        check_tree(model, PROMPT)


@pytest.mark.parametrize("architecture", OTHERS)
def test_configurations_of_other_recurrent_models(architecture: str) -> None:
    assert recurrent_layers(AutoConfig.for_model(architecture))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3_moe", "gpt_oss", "llama4"])
def test_configurations_of_attention_alone(architecture: str) -> None:
    assert recurrent_layers(AutoConfig.for_model(architecture)) == ""


def test_a_hybrid_without_recurrent_layers_is_none() -> None:
    settings = MAMBA | {"layer_types": ["full_attention"] * 2, "num_local_experts": 0}
    model = tiny_model("granitemoehybrid", position_embedding_type="rope", **settings)
    assert recurrent_layers(model.config) == ""
    assert why_not(model) == ""


@pytest.mark.parametrize("dtype", MASKED)
@pytest.mark.parametrize("architecture", HYBRIDS)
def test_a_disguised_hybrid_is_caught(
    architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture, dtype, **HYBRIDS[architecture])
    monkeypatch.setattr("llama_squad.tree_check.recurrent_layers", lambda config: "")
    assert "lets one question see another" in why_not(model)
    with pytest.raises(ValueError, match="see another|takes no tree mask"):
        check_tree(model, PROMPT)


class Leak(nn.Module):
    """A layer that also reads the token before, by very little."""

    def __init__(self, layer: nn.Module, share: float) -> None:
        super().__init__()
        self.layer, self.share = layer, share

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run it."""
        return self.layer(hidden) + self.share * self.layer(hidden.roll(1, 1))


@pytest.mark.parametrize("dtype", MASKED)
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_leak_below_any_tolerance_is_caught(architecture: str, dtype: torch.dtype) -> None:
    model = tree_model(architecture, dtype)
    assert why_not(model) == ""
    attention = model.model.layers[0].self_attn
    attention.v_proj = Leak(attention.v_proj, 1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert "lets one question see another" in why_not(model)
    with pytest.raises(ValueError, match="lets one question see another"):
        check_tree(model, PROMPT)


# Positions and masks that a model overlooks -----------------------------------------------------


def losing(model: Any, *names: str) -> Any:
    """Let a model overlook what it is given."""
    forward = model.forward

    def careless(**kwargs: Any) -> Any:
        lost: dict[str, Any] = {name: None for name in names if name in kwargs}
        mask = kwargs.get("attention_mask")
        if "attention_mask" in names and mask is not None and mask.dim() == 4:
            lost["attention_mask"] = torch.ones_like(mask).tril(mask.shape[-1] - mask.shape[-2])
        return forward(**kwargs | lost)

    model.forward = careless
    return model


@pytest.mark.parametrize("dtype", MASKED)
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gemma2"])
def test_lost_positions_are_caught(architecture: str, dtype: torch.dtype) -> None:
    model = losing(tree_model(architecture, dtype), "position_ids")
    assert "ignores the positions" in why_not(model)
    with pytest.raises(ValueError, match="ignores the positions"):
        check_tree(model, PROMPT)


@pytest.mark.parametrize("dtype", MASKED)
def test_a_lost_mask_is_caught(dtype: torch.dtype) -> None:
    model = losing(tiny_model(dtype=dtype), "attention_mask")
    assert "lets one question see another" in why_not(model)
    with pytest.raises(ValueError, match="lets one question see another"):
        check_tree(model, PROMPT)


@pytest.mark.parametrize("dtype", MASKED)
def test_positions_that_are_off_are_caught(dtype: torch.dtype) -> None:
    """They move the logits, and nothing leaks: only the comparison with plain passes sees it."""
    model = tiny_model(dtype=dtype)
    forward = model.forward

    def off(**kwargs: Any) -> Any:
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = positions * 2
        return forward(**kwargs)

    model.forward = off
    assert "gives other logits" in why_not(model)
    with pytest.raises(ValueError, match="gives other logits"):
        check_tree(model, PROMPT)


def test_other_attentions_are_refused_before_anything_is_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flex_attention")
    row = {"paragraphs": PARAGRAPHS}
    assert "flex_attention attention cannot hold a tree" in check_shared_contexts(
        model, collator(), row
    )


# Windows, and eager attention -------------------------------------------------------------------

ATTENTION: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 8, "attn_implementation": "eager"},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                "attn_implementation": "eager"},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 0},
    "starcoder2": {},
    "mistral": {},
    "gemma3_text": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "llama4_text": {"head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 64,
                    "intermediate_size_mlp": 32,
                    "layer_types": ["chunked_attention", "full_attention"]},
}  # fmt: skip
WINDOWED = ["gemma2", "gpt_oss", "olmo3", "cohere2", "phi3", "starcoder2", "mistral", "gemma3_text"]


@pytest.mark.parametrize("window", [64, None])
@pytest.mark.parametrize(
    ("architecture", "attention"),
    [
        *((architecture, "eager") for architecture in WINDOWED),
        *((architecture, "sdpa") for architecture in WINDOWED[2:]),  # the first two take no other
    ],
)
def test_windows_share_contexts(architecture: str, window: int | None, attention: str) -> None:
    unfelt = 4096 if AutoConfig.for_model(architecture).sliding_window else None
    model = tree_model(architecture, sliding_window=window or unfelt, attn_implementation=attention)
    assert LONGEST > 64
    assert why_not(model) == ""
    check_tree(model, PROMPT)
    shared = [collator()([{"paragraphs": PARAGRAPHS}])]
    separate = [collator()([example]) for example in flatten(PARAGRAPHS)]
    found = difference(model, shared, separate)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("architecture", WINDOWED)
def test_windows_that_a_mask_forgets_are_caught(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tree_model(architecture, sliding_window=64)
    monkeypatch.setattr("llama_squad.tree.attention_windows", lambda config: {})
    assert "gives other logits" in why_not(model)


@pytest.mark.parametrize("window", [0, None])
def test_a_window_of_zero_is_none(window: int | None) -> None:
    settings = {"sliding_window": window, "layer_types": ["full_attention"] * 2}
    config = AutoConfig.for_model("qwen2", num_hidden_layers=2, **settings)
    config.sliding_window = window
    assert attention_windows(config) == {}
    mistral = AutoConfig.for_model("mistral")
    mistral.sliding_window = window
    assert attention_windows(mistral) == {}


def test_masks_of_a_window_follow_positions() -> None:
    model = tree_model("gemma3_text", sliding_window=2)
    visible = torch.tensor([[[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]]]).bool()
    positions = torch.tensor([[0, 1, 2, 2]])
    masks = make_masks(model, visible, positions, positions)
    assert isinstance(masks, dict)
    assert torch.equal(masks["full_attention"], visible)
    assert masks["sliding_attention"][0, 0].int().tolist() == [
        [1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]
    ]  # fmt: skip


# An example that is too long to share -------------------------------------------------------------


def laid_out(model: Any, encoded: Any, folder: Path) -> Any:
    """Lay a dataset out as the stage does."""
    settings = SquadSFTConfig(output_dir=str(folder), report_to="none", bf16=False)
    layout = lay_out(TrainArguments(), settings, {"train": encoded}, model, collator())
    return layout.features["train"]


def scaled_rope(limit: int) -> dict[str, Any]:
    """Make rotary embeddings that change for all where one sequence is longer than ``limit``."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return {"max_position_embeddings": limit, "rope_parameters": rope}


def test_only_the_paragraph_of_a_long_example_is_trained_plainly(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    records = make_records(6, [3])
    for record in records[6:9]:
        record["context"] += " Then nothing happened." * 30
    encoded = encoded_dataset(records)
    limit = sorted(encoded["length"])[-4] + 1
    model = tiny_model(**scaled_rope(limit))
    assert longest_shared(model) == limit
    train = laid_out(model, encoded, tmp_path)
    assert "1 paragraphs with examples too long" in capsys.readouterr().out
    held = [flatten(row["paragraphs"]) for row in train]
    long = [row for row in held if max(len(e["input_ids"]) for e in row) > limit]
    assert [len(row) for row in long] == [1, 1, 1]
    assert sum(map(len, held)) == 18
    assert max(map(len, held)) >= 3
    batches = [collator()([row]) for row in train]
    assert [b["attention_mask"].dim() for b in batches].count(2) == 3
    separate = [collator()([example]) for example in flatten(held)]
    found = difference(model, batches, separate)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_plain_rows_are_dealt_out_to_all_processes(processes: int) -> None:
    encoded = encoded_dataset(make_records(7, [3, 2]))
    limit = max(encoded["length"]) - 1
    plan = plan_rows(
        encoded, questions_per_step=4, processes=processes, row_tokens=2000, max_length=4000,
        seed=0, longest_shared=limit,
    )  # fmt: skip
    assert plan.plain_paragraphs >= 1
    assert len(plan.rows) % processes == 0
    found = [index for row in plan.rows for group in row for index in group]
    assert sorted(found) == list(range(len(encoded)))
    if processes == 1:  # else rows are split, and hold their contexts again
        tokens = sum(
            collator()([row])["input_ids"].numel() for row in row_dataset(encoded, plan.rows)
        )
        assert plan.tokens == pytest.approx(tokens, rel=0.02)


def test_where_every_paragraph_is_too_long_nothing_is_shared(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train = laid_out(tiny_model(**scaled_rope(20)), encoded_dataset(make_records(2, [2])), tmp_path)
    assert "every paragraph holds an example of more than 20 tokens" in capsys.readouterr().out
    assert "input_ids" in train.column_names


def test_a_model_that_takes_no_masks_of_its_windows_shares_what_fits() -> None:
    model = tree_model("gemma3_text", sliding_window=64)
    assert longest_shared(model) is None
    forward = model.forward

    def strict(attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(attention_mask=attention_mask.clone(), **kwargs)

    model.forward = strict
    model.config.layer_types = ["sliding_attention", "full_attention"]
    assert longest_shared(model) == 64


@pytest.mark.parametrize("architecture", ["mistral", "qwen2"])
def test_a_model_with_a_window_of_zero_sees_all(architecture: str, tmp_path: Path) -> None:
    model_folder(tmp_path, architecture, sliding_window=None)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 0}))
    loaded = load_model(ModelArguments(model_name=str(path.parent)))
    assert why_not(loaded) == ""
    ids = torch.tensor([PROMPT])
    expected = tiny_model(architecture, sliding_window=None)(ids).logits
    assert torch.allclose(loaded(ids).logits, expected, atol=1e-5)
