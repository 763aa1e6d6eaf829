"""Supervised fine-tuning: TRL's trainer with our loss, log and validation by real generation."""

import dataclasses
import importlib.util
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, ProgressCallback
from trl import SFTConfig, SFTTrainer

from llama_squad import modeling, preflight, rows
from llama_squad.answers import extract_answer
from llama_squad.collator import ConversationEncoder, SquadDataCollator
from llama_squad.config import (
    ModelArguments,
    TrainArguments,
    TrainerArguments,
    load_run_config,
    save_run_config,
)
from llama_squad.metrics import is_exact_match
from llama_squad.predictors import LocalModel, Prediction, batch_paragraphs
from llama_squad.prompts import build_messages
from llama_squad.tree import (
    RowProbe,
    answer_logits,
    attention_windows,
    check_tree,
    longest_shared,
    why_not_shared,
)

# Flags of TRL's own data preparation, whose part is taken by our encoder and collator. Setting one
# would change nothing, so it is refused, with what does the job here.
REPLACED = {
    "packing": "questions of a paragraph share a row already (see --share_context)",
    "packing_strategy": "rows share contexts instead (see --row_tokens)",
    "padding_free": "rows that share contexts hold next to no padding already",
    "eval_packing": "questions of a paragraph share a row already",
    "completion_only_loss": "the loss falls on the answer only, always",
    "assistant_only_loss": "the loss falls on the answer only, always",
    "dataset_text_field": "create_squad_dataset.py writes messages",
    "dataset_kwargs": "create_squad_dataset.py prepares the data",
    "chat_template_path": "give --chat_template FILE",
    "dataset_num_proc": "the tokenizer works on all cores already, and its result is cached",
    "shuffle_dataset": "examples are shuffled already (see --train_sampling_strategy)",
    "loss_type": "the loss is the negative log-likelihood of the answer's tokens",
    "truncation_mode": "an example that is too long is left out, never cut",
    "model_init_kwargs": "use --dtype, --attn_implementation and the 4-bit flags",
    "eos_token": "the chat template ends the turn",
    "pad_token": "padding is told apart by the attention mask",
    "remove_unused_columns": "the collator takes what it needs",
    "trust_remote_code": "code from a model's repository is never run",
}


def _trackers() -> list[str]:
    """TensorBoard, and Weights & Biases where the user has it and is logged in."""
    found = ["tensorboard"]
    try:
        logged_in = netrc().authenticators("api.wandb.ai") is not None
    except (OSError, NetrcParseError):
        logged_in = False
    if importlib.util.find_spec("wandb") and (logged_in or "WANDB_API_KEY" in os.environ):
        found.append("wandb")
    return found


@dataclass
class SquadSFTConfig(TrainerArguments, SFTConfig):  # type: ignore[misc]  # bf16: see there
    """TRL's ``SFTConfig`` with this project's defaults; every field of it is a flag of training."""

    def __post_init__(self) -> None:
        """Resolve what depends on the machine, and refuse flags that would do nothing."""
        if self.bf16 and self.fp16:
            raise ValueError("--bf16 and --fp16 name two types to compute in: give one of them")
        if self.bf16 is None:
            able = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            self.bf16 = able and not self.fp16
        if self.activation_checkpointing is None:  # the new name of the same
            self.activation_checkpointing = self.gradient_checkpointing
        if torch.accelerator.current_accelerator() is None:
            self.use_cpu = True  # which --bf16 insists on being told
        if self.report_to in ("auto", ["auto"]):
            self.report_to = _trackers()
        defaults = {f.name: f for f in dataclasses.fields(SFTConfig)}
        for name, reason in REPLACED.items():
            if getattr(self, name) != defaults[name].default:
                raise ValueError(f"--{name} does nothing here: {reason}")
        preflight.check_deepspeed(self.deepspeed)
        super().__post_init__()
        preflight.check_packages(self)
        self.remove_unused_columns = False
        self.dataset_kwargs = {"skip_prepare_dataset": True}

    def __getstate__(self) -> dict[str, Any]:
        """Leave secrets out of training_args.bin: every checkpoint and what is pushed hold one."""
        return {k: None if k.endswith("_token") else v for k, v in vars(self).items()}


# The model ------------------------------------------------------------------------------------


def add_lora(model: Any, args: TrainArguments, reasoning_token: int | None = None) -> Any:
    """Put a LoRA adapter on the model; with a reasoning token its embedding is trained too."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
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
    return get_peft_model(model, config)


def check_shared_contexts(
    model: PreTrainedModel, collator: SquadDataCollator, row: Mapping[str, Any]
) -> str:
    """Return why contexts cannot be shared, as found on a row of the run; else "", and say so."""
    probe = RowProbe(model, collator, row["paragraphs"])
    why = why_not_shared(model, probe)
    if not why and os.environ.get("RANK", "0") == "0":
        print(
            f"Shared contexts checked on {len(probe.examples)} questions: none sees another, and "
            "the last one gives the logits that it gives alone."
        )
    return why


def answer_loss(
    model: Any, inputs: Mapping[str, torch.Tensor], label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum the cross entropy over the supervised tokens, with logits for no others.

    ``label_smoothing`` is the share of a token's probability that all tokens have in common.
    Returns the summed loss, how many tokens the model gets right, and how many there are.
    """
    logits, wanted = answer_logits(model, inputs)
    loss = F.cross_entropy(logits, wanted, reduction="sum", label_smoothing=label_smoothing)
    right = (logits.detach().argmax(-1) == wanted).sum()
    return loss, right, torch.tensor(len(wanted), device=loss.device)


def count_batch(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Count a batch of ``SquadDataCollator``: questions, tokens, tokens if nothing was shared."""
    mask = inputs["attention_mask"]
    if mask.dim() == 2:
        tokens = mask.sum()
        return torch.stack([torch.tensor(len(mask), device=mask.device), tokens, tokens])
    # A pad sees itself alone, and so does each row's first token. Positions go on by one within
    # a prefix and its first branch, and jump where a branch ends.
    # So does a later paragraph's first where nothing is shared: but padding comes last.
    real = (mask[:, 0].sum(-1) > 1).flip(-1).cummax(-1).values.flip(-1)
    position = inputs["position_ids"]
    following = F.pad(position, (0, 1), value=-1)[:, 1:]
    leaf = real & ((following != position + 1) | ~F.pad(real, (0, 1))[:, 1:])
    return torch.stack([leaf.sum(), real.sum(), (position + 1)[leaf].sum()])


class SquadTrainer(SFTTrainer):
    """TRL's trainer, with the loss on the answers only and a true log.

    Args:
        validate: called with the model at each evaluation; returns figures such as exact match,
            which join the evaluation's (``eval_exact_match``).
        settings: what is saved beside each checkpoint, by which it is evaluated.
        kwargs: what ``SFTTrainer`` takes.
    """

    model: Any
    args: Any

    def __init__(
        self,
        *,
        validate: Callable[[Any], dict[str, float]] | None = None,
        settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._validate = validate
        self._settings = settings
        self._counts = torch.zeros(3, dtype=torch.long)
        self._since = time.perf_counter()
        # TRL casts the adapters of a 4-bit model to bfloat16, whose steps near 0.01 are 6e-5: at a
        # learning rate of 2e-7 the updates would be rounded away.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LossBar)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of the supervised tokens over their number in the whole step."""
        if return_outputs:  # for ``compute_metrics``, which wants the logits too
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, right, supervised = answer_loss(model, inputs, self.args.label_smoothing_factor)
        if num_items_in_batch is None:
            return loss / supervised.clamp(min=1)
        self._metrics["train"]["mean_token_accuracy"].append((right / supervised).item())
        counts = count_batch(inputs).cpu()
        self._counts += counts
        loss = loss / num_items_in_batch
        # `num_items_in_batch` counts the tokens of all processes, and DDP averages gradients
        return (
            loss * self.accelerator.num_processes
            if self.args.average_tokens_across_devices
            else loss
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the true throughput since the last log, over all processes."""
        if "loss" in logs:
            now = time.perf_counter()
            total = self.accelerator.reduce(self._counts.to(self.accelerator.device))
            questions, tokens, plain = total.tolist()
            seconds = now - self._since
            logs["questions_per_second"] = round(questions / seconds, 2)
            logs["tokens_per_second"] = round(tokens / seconds, 1)
            logs["tokens_saved"] = round(1 - tokens / max(plain, 1), 4)
            # from the log itself, which a checkpoint brings back
            earlier = (e["num_tokens"] for e in self.state.log_history[::-1] if "num_tokens" in e)
            self._total_train_tokens = next(earlier, 0) + tokens
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            self._counts.zero_()
            self._since = now
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save the run's settings first: the trainer's state comes last, and marks it complete."""
        if self._settings is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            save_run_config(folder, "train", **self._settings)
        super()._save_checkpoint(model, trial)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, the clock of the throughput starting now."""
        self._since = time.perf_counter()
        return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the loss, and answer validation questions by real generation."""
        metrics = super().evaluate(*args, **kwargs)
        if self._validate is not None:
            prefix = kwargs.get("metric_key_prefix", "eval")
            training = self.model.training
            self.model.eval()
            figures = self._validate(self.accelerator.unwrap_model(self.model))
            self.model.train(training)
            figures = {f"{prefix}_{name}": value for name, value in figures.items()}
            metrics |= figures
            self.log(figures)
        self._since = time.perf_counter()
        return metrics


class LossBar(ProgressCallback):
    """The progress bar, with the loss and the throughput of the last log behind it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the figures."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            shown = {"loss": f"{float(logs['loss']):.4f}"}
            if "tokens_per_second" in logs:
                shown["tokens/s"] = f"{logs['tokens_per_second']:,.0f}"
                shown["questions/s"] = f"{logs['questions_per_second']:,.1f}"
            self.training_bar.set_postfix(shown)


# Putting a run together ------------------------------------------------------------------------


def find_checkpoint(asked: str | None, output_dir: str) -> str | None:
    """Return the checkpoint to resume from; "latest" is the newest complete one.

    Raises:
        ValueError: there is none.
    """
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() in ("latest", "true"):
        found = [p for p in Path(output_dir).glob("checkpoint-*") if p.name[11:].isdigit()]
    else:
        found = [Path(asked)]
    complete = [path for path in found if _is_complete(path)]
    if not complete:
        raise ValueError(
            f"no complete checkpoint in {output_dir if len(found) != 1 else found[0]}: "
            "leave --resume_from_checkpoint out to start anew"
        )
    if len(complete) == 1:  # of any name
        return str(complete[0])
    return str(max(complete, key=lambda path: int(path.name[11:])))


def newest_checkpoint(output_dir: str, since: float) -> str | None:
    """Return the checkpoint that was completed last, if that was after ``since`` (Unix time, s)."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _is_complete(path)]
    times = {path: (path / "trainer_state.json").stat().st_mtime for path in found}
    newest = max(times, key=times.__getitem__, default=None)
    return str(newest) if newest and times[newest] >= since else None


def _is_complete(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was written to its end: the trainer writes its state last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def prepare_model(
    args: TrainArguments, model_args: ModelArguments, encoder: ConversationEncoder
) -> Any:
    """Load the base model and make it trainable in the way that the arguments ask for."""
    if args.full_parameters:
        if model_args.dtype == "auto":  # bfloat16 weights would swallow small updates
            model_args = dataclasses.replace(model_args, dtype="float32")
        return modeling.load_model(model_args)
    model = modeling.load_model(model_args, quantize=args.quantize)
    model = add_lora(model, args, encoder.pause[0] if encoder.pause else None)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = "4 bits" if args.quantize else str(model.dtype)
    print(f"LoRA: {trained:,} trainable parameters on a base in {base}.")
    return model


def lay_out(
    args: TrainArguments,
    sft_args: Any,
    encoded: dict[str, Any],
    model: Any,
    collator: SquadDataCollator,
) -> dict[str, Any]:
    """Return the datasets to train and evaluate on: rows that share contexts, or plain examples.

    With rows, ``per_device_train_batch_size`` and ``gradient_accumulation_steps`` of ``sft_args``
    come to mean rows, so that a step holds about as many questions as was asked for.
    """
    questions = (
        sft_args.per_device_train_batch_size
        * sft_args.gradient_accumulation_steps
        * sft_args.world_size
    )
    why = "as asked"
    if args.share_context:
        limit = longest_shared(model)
        planned = {
            name: rows.plan_rows(
                split,
                questions_per_step=questions,
                # an evaluation's last batch may hold a row twice, and counts it once
                processes=sft_args.world_size if name == "train" else 1,
                row_tokens=args.row_tokens,
                max_length=sft_args.max_length,
                seed=sft_args.seed,
                longest_shared=limit,
            )
            for name, split in encoded.items()
        }
        features = {
            name: rows.row_dataset(encoded[name], plan.rows) for name, plan in planned.items()
        }
        windows = attention_windows(model.config)
        tried = planned["train"].row_to_try(encoded["train"]["length"], windows.values())
        why = f"every paragraph holds an example of more than {limit} tokens"
        if tried is not None:
            why = check_shared_contexts(model, collator, features["train"][tried])
        if not why:
            print(planned["train"].describe())
            sft_args.per_device_train_batch_size = 1
            sft_args.per_device_eval_batch_size = 1
            sft_args.gradient_accumulation_steps = planned["train"].rows_per_step
            sft_args.train_sampling_strategy = "random"  # the rows are balanced already
            return features
    print(f"Plain batches, contexts not shared: {why}. A step holds {questions} questions.")
    return {name: split.remove_columns("paragraph") for name, split in encoded.items()}


def make_validation(
    sft_args: Any, dataset: Any, dataset_name: str, encoder: ConversationEncoder
) -> Callable[[Any], dict[str, float]] | None:
    """Return what answers the validation questions by real generation at each evaluation.

    Replies are free and greedy, so that the figures show how far the format is learned too.
    Processes take the paragraphs in turns and add up what they count. None where there is nothing
    to validate on.
    """
    if "val" not in dataset or sft_args.eval_strategy == "no":
        sft_args.eval_strategy = "no"
        return None
    created = load_run_config(dataset_name).get("create", {})
    prompts = {key: created[key] for key in ("prompt", "system_prompt") if key in created}
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
        local = LocalModel(model, encoder, decoding="free", max_new_tokens=128, **prompts)
        counts = Counter[str]()
        for batch in tqdm(batches, desc="Validating", leave=False, unit=" batches"):
            counts.update(key for prediction in local.answer(batch) for key in _verdict(prediction))
        keys = ("questions", "valid", "right", "answerable", "found", "abstained")
        total = torch.tensor([counts[key] for key in keys], device=model.device)
        if sft_args.world_size > 1:
            torch.distributed.all_reduce(total)
        n = dict(zip(keys, total.tolist(), strict=True))
        return {
            "exact_match": n["right"] / max(n["questions"], 1),
            "valid_json": n["valid"] / max(n["questions"], 1),
            "correct_has_answer": n["found"] / max(n["answerable"], 1),
            "correct_no_answer": n["abstained"] / max(n["questions"] - n["answerable"], 1),
        }

    return validate


def _verdict(prediction: Prediction) -> Iterator[str]:
    """Yield the counters that one prediction adds to."""
    answer = extract_answer(prediction.reply.completion)
    golds = prediction.record["answers"]["text"]
    yield "questions"
    if golds:
        yield "answerable"
    if answer.state != "malformed":
        yield "valid"
    if is_exact_match(answer, golds):
        yield "right"
        yield "found" if golds else "abstained"
