"""What a run is made of: the model with its adapter, the rows, the validation."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from llama_squad import modeling
from llama_squad.activation import activate
from llama_squad.answers import extract_answer
from llama_squad.arguments import ModelArguments, TrainArguments
from llama_squad.collator import SquadDataCollator
from llama_squad.config import load_run_config, prompt_settings
from llama_squad.decoding.cache import check_tree
from llama_squad.decoding.kept import Kept
from llama_squad.encoding import ChatEncoder, label_all
from llama_squad.lora import quicken
from llama_squad.metrics import Outcome, strict_counts, strict_outcome
from llama_squad.predictors.base import Batch, batch_paragraphs
from llama_squad.predictors.local import LocalModel
from llama_squad.processes import is_sharded, of_first, this_process
from llama_squad.prompts import build_messages
from llama_squad.training.checkpoints import digest
from llama_squad.training.packing import Plan, plan_rows, row_dataset
from llama_squad.tree import attention_windows
from llama_squad.tree_check import RowProbe, longest_shared, why_not_shared

# The model ------------------------------------------------------------------------------------


def add_lora(model: Any, args: TrainArguments, reasoning_token: int | None = None) -> Any:
    """Put a LoRA adapter on the model; with a reasoning token its embedding is trained too."""
    from peft import LoraConfig, get_peft_model

    modules: str | list[str] = args.lora_target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=modules[0] if modules == ["all-linear"] else modules,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        trainable_token_indices=[reasoning_token] if reasoning_token is not None else None,
    )
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        if "lora_dropout" not in str(error):
            raise
        raise ValueError(
            "the experts of this mixture are adapted as parameters, which take no dropout: give "
            "--lora_dropout 0, or adapt attention alone by --lora_target_modules"
        ) from error
    if args.alora_from != "start":
        activate(model, args.alora_from)
    return model


def check_shared_contexts(
    model: PreTrainedModel, collator: SquadDataCollator, row: Mapping[str, Any]
) -> str:
    """Return why contexts cannot be shared, as found on a row of the run; else "", and say so."""
    probe = RowProbe(model, collator, row["paragraphs"])
    why = why_not_shared(model, probe)
    if not why:
        print(
            f"Shared contexts checked on {len(probe.examples)} questions: none sees another, and "
            "the last one gives the logits that it gives alone."
        )
    return why


# Putting a run together ------------------------------------------------------------------------


def prepare_model(args: TrainArguments, model_args: ModelArguments, encoder: ChatEncoder) -> Any:
    """Load the base model and make it trainable in the way that the arguments ask for."""
    if args.full_parameters:
        if model_args.dtype == "auto":  # bfloat16 weights would swallow small updates
            model_args = dataclasses.replace(model_args, dtype="float32")
        return modeling.load_model(model_args, sharded=is_sharded())
    model = modeling.load_model(model_args, quantize=args.quantize, sharded=is_sharded())
    if getattr(model, "is_loaded_in_4bit", False):
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if args.from_adapter:
        base_name = model_args.model_name
        model = modeling.attach_adapter(model, args.from_adapter, base_name, trainable=True)
    else:
        model = add_lora(model, args, encoder.reasoning_ids[0] if encoder.reasoning_ids else None)
    quicken(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = "4 bits" if args.quantize else str(model.dtype)
    if this_process().is_main_process:
        source = f", going on from {args.from_adapter}" if args.from_adapter else ""
        print(f"LoRA: {trained:,} trainable parameters on a base in {base}{source}.")
    return model


@dataclass(frozen=True)
class Layout:
    """The datasets to train and evaluate on, and what they ask of the trainer."""

    features: dict[str, Any]  # by split: rows that share contexts, or plain examples
    settings: dict[str, Any]  # of the trainer, for these; see ``SquadSFTConfig.replace``
    rows: str  # tells the layout of the training split from others


def lay_out(
    args: TrainArguments,
    sft_args: Any,
    encoded: dict[str, Any],
    model: Any,
    collator: SquadDataCollator,
) -> Layout:
    """Lay the examples out in rows that share contexts, or plainly where that cannot be.

    With rows, ``per_device_train_batch_size`` and ``gradient_accumulation_steps`` of the returned
    settings mean rows, so that a step holds about as many questions as ``sft_args`` asks for.
    """
    no_val = {"eval_strategy": "no", "eval_on_start": False}
    settings: dict[str, Any] = {} if "val" in encoded else no_val
    why = "as asked"
    labelled = dict(encoded)
    if args.loss_on == "all":
        labelled["train"] = encoded["train"].map(label_all, desc="Labelling all tokens")
    if args.share_context and args.chat_kl and args.loss_on == "all":
        why = "--chat_kl falls on all tokens of chat, and not on those that it shares"
    elif args.share_context:
        limit = of_first(lambda: longest_shared(model))  # under FSDP it alone may hold the weights
        planned = _plan_splits(args, sft_args, labelled, limit)
        features = {name: row_dataset(labelled[name], plan.rows) for name, plan in planned.items()}
        windows = attention_windows(model.config)
        tried = planned["train"].row_to_try(encoded["train"]["length"], windows.values())
        why = f"every paragraph holds an example of more than {limit} tokens"
        if tried is not None:
            row = row_dataset(encoded["train"], planned["train"].rows)[tried]
            why = of_first(lambda: check_shared_contexts(model, collator, row))
        if not why:
            if sft_args.process_index == 0:
                print(planned["train"].describe())
            settings |= {
                "per_device_train_batch_size": 1,
                "per_device_eval_batch_size": 1,
                "gradient_accumulation_steps": planned["train"].rows_per_step,
                "train_sampling_strategy": "random",  # the rows are balanced already
            }
            return Layout(features, settings, f"shared contexts {digest(planned['train'].rows)}")
    if args.filler and why != "as asked":
        raise ValueError(
            f"--filler needs a mask, which this model does not take ({why}): leave it out"
        )
    if sft_args.process_index == 0:
        step = _plain_step(_questions_per_step(sft_args), encoded["train"])
        print(f"Plain batches, contexts not shared: {why}. {step}")
    features = {name: split.remove_columns("paragraph") for name, split in labelled.items()}
    return Layout(features, settings, "plain batches")


def _questions_per_step(sft_args: Any) -> int:
    batch = sft_args.per_device_train_batch_size * sft_args.gradient_accumulation_steps
    return batch * sft_args.world_size


def _plan_splits(
    args: TrainArguments, sft_args: Any, encoded: Mapping[str, Any], limit: int | None
) -> dict[str, Plan]:
    return {
        name: plan_rows(
            split,
            questions_per_step=_questions_per_step(sft_args),
            # an evaluation's last batch may hold a row twice, and counts it once
            processes=sft_args.world_size if name == "train" else 1,
            row_tokens=args.row_tokens,
            max_length=sft_args.max_length,
            seed=sft_args.seed,
            longest_shared=limit,
        )
        for name, split in encoded.items()
    }


def _plain_step(questions: int, train: Any) -> str:
    if questions >= len(train):
        return f"A step holds {len(train)} questions: all that there are."
    rest = "; the last of an epoch what is left" if len(train) % questions else ""
    return f"A step holds {questions} questions{rest}."


VALIDATED = {
    "exact_match": "% Exact Match",
    "valid_json": "% Valid JSON",
    "correct_has_answer": "% Correct Has Answer",
    "correct_no_answer": "% Correct No Answer",
}
"""What an evaluation during training tells → the column of the table, as a share."""


VALIDATION_TOKENS = 128
"""Length limit of a reply to a validation question."""


def make_validation(
    sft_args: Any, dataset: Any, dataset_name: str, encoder: ChatEncoder
) -> Callable[[Any], dict[str, float]] | None:
    """Return what answers the validation questions by real generation at each evaluation.

    Replies are free and greedy, so that the figures show how far the format is learned too.
    Processes take the paragraphs in turns and add up what they count. None where there is nothing
    to validate on.
    """
    if "val" not in dataset or sft_args.eval_strategy == "no":
        return None
    if is_sharded():
        if sft_args.process_index == 0:
            print("No answers to the validation questions, only their loss: weights are sharded.")
        return None
    prompts = prompt_settings(load_run_config(dataset_name).get("create", {}))
    batches = list(batch_paragraphs(dataset["val"].to_list(), sft_args.per_device_eval_batch_size))[
        sft_args.process_index :: sft_args.world_size
    ]

    first = build_messages(dataset["val"][0], answer=False, **prompts)

    def validate(model: Any) -> dict[str, float]:
        try:  # on all processes alike, whatever their share of the questions
            check_tree(model, encoder.encode_prompts([first])[0])
        except ValueError as error:
            print(f"No answers to the validation questions, only their loss: {error}.")
            return {}
        local = LocalModel(
            model, encoder,
            decoding="free", max_new_tokens=VALIDATION_TOKENS, stop_after_answer=True,
            kept=Kept(model, packs=False), **prompts,
        )  # fmt: skip
        outcomes, fault = _outcomes(local, batches)
        counts = strict_counts(outcomes)
        totals = [*(counts[column] for column in VALIDATED.values()), (bool(fault), 1)]
        summed = torch.tensor(totals, device=model.device)
        if sft_args.world_size > 1:
            torch.distributed.all_reduce(summed)
        *pairs, (faults, _) = summed.tolist()
        if faults:
            print(f"No answers to the validation questions, only their loss: {fault or '(above)'}.")
            return _no_figures(sft_args)
        return {
            n: right / max(tried, 1) for n, (right, tried) in zip(VALIDATED, pairs, strict=True)
        }

    return validate


def _no_figures(sft_args: Any) -> dict[str, float]:
    """Return no figures, but for the one by which checkpoints are compared: that it is none."""
    best = (sft_args.metric_for_best_model or "").removeprefix("eval_")
    return {best: math.nan} if best in VALIDATED else {}


def _outcomes(local: LocalModel, batches: Sequence[Batch]) -> tuple[Counter[Outcome], str]:
    """Count what the answers to validation questions are; and why they cannot be had, or ""."""
    outcomes = Counter[Outcome]()
    try:
        for batch in tqdm(batches, desc="Validating", leave=False, unit=" batches"):
            outcomes.update(
                strict_outcome(extract_answer(p.reply.completion), p.record["answers"]["text"])
                for p in local.answer(batch)
            )
    except ValueError as error:  # of one prompt, such as one on which float16 overflows
        return outcomes, str(error)
    return outcomes, ""
