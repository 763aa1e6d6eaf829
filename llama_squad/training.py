"""Supervised fine-tuning: TRL's trainer with our loss, log and validation by real generation."""

import dataclasses
import importlib.util
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, ProgressCallback
from trl import SFTConfig, SFTTrainer

from llama_squad import modeling, preflight, rows
from llama_squad.answers import extract_answer
from llama_squad.checkpoints import digest
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

    def replace(self, **settings: Any) -> Self:
        """Return a copy with other settings, resolved already; secrets stay in it."""
        changed = object.__new__(type(self))
        vars(changed).update(vars(self) | settings)
        return changed


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
        # since the last log: questions, tokens, tokens if nothing was shared; supervised tokens,
        # and how many of them were predicted
        self._counts = torch.zeros(5, dtype=torch.long)
        self._questions = 0  # of all processes in this training, up to the last log
        self._since = self._started = time.perf_counter()  # put off by what evaluations take
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
        counts = torch.cat([count_batch(inputs), torch.stack([supervised, right])])
        self._counts = self._counts.to(counts.device) + counts
        loss = loss / num_items_in_batch
        # `num_items_in_batch` counts the tokens of all processes, and DDP averages gradients
        return (
            loss * self.accelerator.num_processes
            if self.args.average_tokens_across_devices
            else loss
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the true accuracy and throughput, over all processes.

        What the library calls samples are rows; here they are questions, and ``train_runtime`` is
        without evaluations, so that all figures of the throughput agree.
        """
        if "loss" in logs:
            logs |= self._since_last_log()
        if "train_runtime" in logs:
            self._since_last_log()  # the steps after the last log
            seconds = time.perf_counter() - self._started
            steps = self.state.global_step - self._initial_global_step
            logs["train_runtime"] = round(seconds, 4)
            logs["train_samples_per_second"] = round(self._questions / seconds, 3)
            logs["train_steps_per_second"] = round(steps / seconds, 3)
        if "eval_samples_per_second" in logs:
            questions = rows.count_questions(self.eval_dataset)
            logs["eval_samples_per_second"] = round(questions / logs["eval_runtime"], 3)
        super().log(logs, start_time)

    def _since_last_log(self) -> dict[str, float]:
        """Return the figures since the last call, over all processes, and start counting anew."""
        now = time.perf_counter()
        total = self.accelerator.reduce(self._counts.to(self.accelerator.device)).tolist()
        questions, tokens, plain, supervised, right = total
        self._questions += questions
        # from the log itself, which a checkpoint brings back
        earlier = (e["num_tokens"] for e in self.state.log_history[::-1] if "num_tokens" in e)
        self._total_train_tokens = next(earlier, 0) + tokens
        seconds = now - self._since
        self._counts.zero_()
        self._since = now
        return {
            "mean_token_accuracy": right / max(supervised, 1),
            "num_tokens": self._total_train_tokens,
            "questions_per_second": round(questions / seconds, 2),
            "tokens_per_second": round(tokens / seconds, 1),
            "tokens_saved": round(1 - tokens / max(plain, 1), 4),
        }

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save the run's settings first: the trainer's state comes last, and marks it complete."""
        if self._settings is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            save_run_config(folder, "train", **self._settings)
        super()._save_checkpoint(model, trial)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, the clock of the throughput starting now."""
        self._since = self._started = time.perf_counter()
        self._questions = 0
        return super().train(*args, **kwargs)

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint's weights. Raises ValueError where they are of other shapes."""
        try:
            super()._load_from_checkpoint(checkpoint, model)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise ValueError(
                f"the weights in {checkpoint} do not fit this model: they were trained with "
                "another --model_name, --lora_r or --lora_target_modules"
            ) from error

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the loss, and answer validation questions by real generation."""
        start = time.perf_counter()
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
        seconds = time.perf_counter() - start
        self._since += seconds
        self._started += seconds
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
    if os.environ.get("RANK", "0") == "0":
        print(f"LoRA: {trained:,} trainable parameters on a base in {base}.")
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
    questions = (
        sft_args.per_device_train_batch_size
        * sft_args.gradient_accumulation_steps
        * sft_args.world_size
    )
    settings: dict[str, Any] = {} if "val" in encoded else {"eval_strategy": "no"}
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
            if sft_args.process_index == 0:
                print(planned["train"].describe())
            settings |= {
                "per_device_train_batch_size": 1,
                "per_device_eval_batch_size": 1,
                "gradient_accumulation_steps": planned["train"].rows_per_step,
                "train_sampling_strategy": "random",  # the rows are balanced already
            }
            return Layout(features, settings, f"shared contexts {digest(planned['train'].rows)}")
    if sft_args.process_index == 0:
        step = _plain_step(questions, encoded["train"])
        print(f"Plain batches, contexts not shared: {why}. {step}")
    features = {name: split.remove_columns("paragraph") for name, split in encoded.items()}
    return Layout(features, settings, "plain batches")


def _plain_step(questions: int, train: Any) -> str:
    if questions >= len(train):
        return f"A step holds {len(train)} questions: all that there are."
    rest = "; the last of an epoch what is left" if len(train) % questions else ""
    return f"A step holds {questions} questions{rest}."


def make_validation(
    sft_args: Any, dataset: Any, dataset_name: str, encoder: ConversationEncoder
) -> Callable[[Any], dict[str, float]] | None:
    """Return what answers the validation questions by real generation at each evaluation.

    Replies are free and greedy, so that the figures show how far the format is learned too.
    Processes take the paragraphs in turns and add up what they count. None where there is nothing
    to validate on.
    """
    if "val" not in dataset or sft_args.eval_strategy == "no":
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
