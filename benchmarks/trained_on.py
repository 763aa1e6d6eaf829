"""Which questions an adapter was trained on: the rows of its training, laid out and drawn again."""

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler

sys.path.append(str(Path(__file__).resolve().parent.parent))
from llama_squad import modeling
from llama_squad.arguments import ModelArguments
from llama_squad.config import load_run_config
from llama_squad.encoding import label_all
from llama_squad.training.checkpoints import RUN_RECORD, digest
from llama_squad.training.examples import encode_split
from llama_squad.training.packing import plan_rows, row_dataset
from llama_squad.tree import Tree


def trained_on(folder: str | Path, split: Any) -> list[int]:
    """Return the places in a training split of the questions that an adapter has seen, in order.

    Args:
        folder: final_checkpoints of ``train_llama_squad.py``.
        split: the training split, as it was then.

    Raises:
        ValueError: the folder does not tell, or the rows come out otherwise than they were then.
    """
    saved = _saved(folder)
    record, figures = saved[RUN_RECORD], saved["figures"]
    model = ModelArguments(
        model_name=record["model_name"], chat_template=saved["model"]["chat_template"]
    )
    encoder = modeling.load_encoder(model, record["reasoning_tokens"], filler=record["filler"])
    encoded, dropped = encode_split(
        split, encoder, record["max_length"], "train", prompt=record["prompt"],
        adapter_from="start" if record["full_parameters"] else record.get("alora_from", "start"),
    )  # fmt: skip
    if dropped:
        raise ValueError(f"{folder} was trained without {dropped} long examples: not supported")
    if record["loss_on"] == "all":
        encoded = encoded.map(label_all)
    batch = record["per_device_train_batch_size"] * record["gradient_accumulation_steps"]
    plan = plan_rows(
        encoded,
        questions_per_step=batch * record["processes"],
        processes=record["processes"],
        row_tokens=record["row_tokens"],
        max_length=record["max_length"],
        seed=record["seed"],
    )
    differs = f"the rows that {folder} was trained on come out otherwise here"
    if f"shared contexts {digest(plan.rows)}" != record["rows"]:
        raise ValueError(f"{differs}: of another dataset, or a model that shares no long contexts")
    rows = [plan.rows[i] for i in _drawn(len(plan.rows), record)]
    seen = rows[: figures["step"] * plan.rows_per_step * record["processes"]]
    trees = (Tree.build(row["paragraphs"]) for row in row_dataset(encoded, seen))
    tokens = itertools.accumulate(len(tree.input_ids) for tree in trees)
    if len(seen) < len(rows) and figures["num_tokens"] not in tokens:  # of the last step of its log
        raise ValueError(f"{differs}: they are drawn in another order")
    return [index for row in seen for paragraph in row for index in paragraph]


def _drawn(rows: int, record: dict[str, Any]) -> list[int]:
    """Return the order in which the trainer draws its rows in the first epoch."""
    seed = record["seed"] if record["data_seed"] is None else record["data_seed"]
    sampler = SeedableRandomSampler(range(rows), generator=torch.Generator(), data_seed=seed)
    return list(sampler)


def _saved(folder: str | Path) -> dict[str, Any]:
    """Return what a training saved beside its adapter; ValueError where that tells no rows."""
    saved = load_run_config(folder)
    record, figures = saved.get(RUN_RECORD, {}), saved.get("figures", {})
    if not {"rows", "processes"} <= record.keys() or "num_tokens" not in figures:
        raise ValueError(f"{folder} does not say what it was trained on: it is no finished run's")
    if not record["rows"].startswith("shared contexts ") or record["chat_share"]:
        raise ValueError(f"{folder} was trained on plain batches, or with chat: not supported")
    if record["from_adapter"] or saved["trainer"]["load_best_model_at_end"]:
        raise ValueError(
            f"{folder} went on from an adapter, or is not its run's last: not supported"
        )
    return saved
