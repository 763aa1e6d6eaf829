"""Supervised fine-tuning: TRL's trainer with our loss, log and validation by real generation."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer

from llama_squad.config import save_run_config
from llama_squad.encoding import IGNORE
from llama_squad.processes import this_process
from llama_squad.supervised import CrossEntropy, answer_logits, next_tokens
from llama_squad.training.packing import count_questions
from llama_squad.tree import NOT_OF_MODEL, ask_no_router, kept_logits, widen


def answer_loss(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    label_smoothing: float = 0.0,
    chat_kl: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum the cross entropy over the supervised tokens, with logits for no others.

    Args:
        model: causal language model.
        inputs: a batch of ``SquadDataCollator``; its tensors are of shape (rows, length), and its
            mask of (rows, 1, length, length) where examples share a row.
        label_smoothing: the share of a token's probability that all tokens have in common.
        chat_kl: weight of the divergence from the base that the supervised tokens of plain chat add
            to the loss; see ``chat_divergence``.

    Returns:
        Three scalars: the summed loss in nats, how many supervised tokens the model gets right, and
        how many there are; one that examples share counts for each of them.
    """
    base = chat_logits_of_base(model, inputs) if chat_kl and "chat" in inputs else None
    logits, wanted = answer_logits(model, inputs)
    supervised = next_tokens(inputs["labels"], IGNORE) != IGNORE
    weights = next_tokens(inputs["weights"], 0)[supervised] if "weights" in inputs else None
    loss, right = CrossEntropy.apply(logits, wanted, label_smoothing, weights)
    if base is not None:
        of_chat = next_tokens(inputs["chat"], 0)[supervised]
        loss = loss + chat_kl * chat_divergence(base, logits[of_chat])
    count = torch.tensor(len(wanted), device=loss.device) if weights is None else weights.sum()
    return loss, right, count


def chat_logits_of_base(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return what the model without its adapter says where a batch has replies of plain chat.

    Logits are of shape (supervised tokens of chat, vocabulary); None where there is no such token
    (but not with several processes, which must do the same).
    """
    keep = next_tokens(inputs["chat"], 0) & (next_tokens(inputs["labels"], IGNORE) != IGNORE)
    if this_process().num_processes == 1 and not keep.any():
        return None
    # before the tuned pass: switching an adapter off and on again touches what is trained
    with torch.no_grad(), getattr(model, "module", model).disable_adapter():
        return kept_logits(model, inputs, keep)


def chat_divergence(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """Return KL(base || tuned) in nats, summed over tokens; logits of (tokens, vocabulary)."""
    base, tuned = (widen(logits).log_softmax(-1) for logits in (base, tuned))
    return F.kl_div(tuned, base, reduction="sum", log_target=True)


def mean_supervised(dataset: Any) -> float:
    """Return how many supervised tokens a row of a dataset holds on average."""
    rows = (row.get("paragraphs", [[row]]) for row in dataset)
    examples = (example for paragraphs in rows for group in paragraphs for example in group)
    # the first token of all is not predicted
    return sum(label != IGNORE for e in examples for label in e["labels"][1:]) / len(dataset)


class SquadTrainer(SFTTrainer):
    """TRL's trainer, with the loss on the answers only and a true log.

    Its collator is a ``SquadDataCollator`` with ``counts``.

    Args:
        validate: called with the model at each evaluation; returns figures such as exact match,
            which join the evaluation's (``eval_exact_match``).
        settings: what is saved beside each checkpoint, by which it is evaluated.
        chat_kl: see ``answer_loss``.
        kwargs: what ``SFTTrainer`` takes.
    """

    model: Any
    args: Any

    def __init__(
        self,
        *,
        validate: Callable[[Any], dict[str, float]] | None = None,
        settings: Mapping[str, Any] | None = None,
        chat_kl: float = 0.0,
        **kwargs: Any,
    ) -> None:
        model = kwargs["model"]
        in_4_bits = getattr(model, "is_loaded_in_4bit", False)
        exact = [(p, p.data) for p in model.parameters() if in_4_bits and p.requires_grad]
        self._by_length: SeededByLength | None = None
        if kwargs["args"].n_gpu > 1:  # a model that one GPU holds is copied to others by torchrun
            kwargs["args"]._n_gpu = 1
        super().__init__(**kwargs)
        # TRL asks mixtures of experts for their balancing loss, which is no part of ours
        self.aux_loss_enabled = False
        ask_no_router(model)
        # of any model: some say no, and would be given no number of tokens to divide by
        self.model_accepts_loss_kwargs = True
        self._validate = validate
        self._settings = settings
        self._chat_kl = chat_kl
        self._evaluated: Any = None  # the dataset of the evaluation that is going on, or was last
        self._row_tokens = 0.0  # its supervised tokens in a row on average, while it goes on
        # since the last log: questions, tokens, tokens if nothing was shared; supervised tokens,
        # and how many of them were predicted
        self._counts = torch.zeros(5, dtype=torch.long)
        self._questions = 0  # of all processes in this training, up to the last log
        self._since = self._started = time.perf_counter()  # put off by what evaluations take
        # TRL casts the adapters of a 4-bit model to bfloat16, whose steps near 0.01 are 6e-5: at a
        # learning rate of 2e-7 the updates would be rounded away. So would what an adapter has
        # learned already, where training goes on from one.
        for parameter, data in exact:
            parameter.data = data
        adapted = hasattr(model, "peft_config")
        for parameter in self.model.parameters():
            # a whole model is trained in bfloat16 where asked; float16 holds no optimizer's steps
            if parameter.requires_grad and (adapted or parameter.dtype == torch.float16):
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
            features = {
                name: value
                for name, value in inputs.items()
                if name == "labels" or name not in NOT_OF_MODEL
            }
            return super().compute_loss(model, features, return_outputs, num_items_in_batch)
        smoothing = self.args.label_smoothing_factor
        loss, right, supervised = answer_loss(model, inputs, smoothing, self._chat_kl)
        if num_items_in_batch is None:
            if self._row_tokens:  # the evaluation takes the mean of rows
                supervised = torch.tensor(self._row_tokens * len(inputs["input_ids"]))
            return loss / supervised.clamp(min=1)
        counts = torch.cat([inputs["counts"].sum(0), torch.stack([supervised, right])])
        self._counts = self._counts.to(counts.device) + counts
        loss = loss / num_items_in_batch
        # `num_items_in_batch` counts the tokens of all processes, and DDP averages gradients
        return (
            loss * self.accelerator.num_processes
            if self.args.average_tokens_across_devices
            else loss
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """Count a step's labels; one that examples share counts for each of them."""

        def separate(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            labels = batch["labels"].flatten().repeat_interleave(batch["weights"].flatten())
            return {"labels": F.pad(labels, (1, 0), value=IGNORE)}  # as no first token has one

        each = [separate(batch) if "weights" in batch else batch for batch in batch_samples]
        return super()._get_num_items_in_batch(each, device)

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
            if not steps:  # the checkpoint had them all
                logs.pop("train_loss", None)
        if "eval_samples_per_second" in logs:
            questions = count_questions(self._evaluated)
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

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the library's sampler; that by length with an order that a resumed run repeats."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = self._by_length = SeededByLength(sampler.batch_size, sampler.lengths, seed)
        return sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save the run's settings first: the trainer's state comes last, and marks it complete."""
        if self._settings is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            (folder / "trainer_state.json").unlink(missing_ok=True)  # of an earlier run
            save_run_config(folder, "train", **self._settings)
        super()._save_checkpoint(model, trial)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: TRL's knows nothing of the task, and no base in a folder.

        The final folder's own card is ``publishing.model_card``.
        """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, the clock of the throughput starting now."""
        self._since = self._started = time.perf_counter()
        self._questions = 0
        return super().train(*args, **kwargs)

    def _run_epoch(self, model: Any, epoch: int, *args: Any, **kwargs: Any) -> None:
        """Run an epoch; none where the checkpoint has all steps: the library would add one."""
        if self._by_length:  # accelerate does not reach it where several processes skip batches
            self._by_length.set_epoch(epoch)
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(model, epoch, *args, **kwargs)

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

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the loss per supervised token, and answer questions by real generation."""
        start = time.perf_counter()
        self._evaluated = self.eval_dataset if eval_dataset is None else eval_dataset
        self._row_tokens = mean_supervised(self._evaluated)
        try:
            metrics = super().evaluate(eval_dataset, *args, **kwargs)
        finally:
            self._row_tokens = 0.0
        if self._validate is not None:
            prefix = kwargs.get("metric_key_prefix", "eval")
            training = self.model.training
            self.model.eval()
            answered = self._validate(self.accelerator.unwrap_model(self.model))
            self.model.train(training)
            answered = {f"{prefix}_{name}": value for name, value in answered.items()}
            metrics |= answered
            self.log(answered)
        seconds = time.perf_counter() - start
        self._since += seconds
        self._started += seconds
        return metrics


class SeededByLength(LengthGroupedSampler):
    """Examples of about one length together, in an order that seed and epoch alone decide.

    The library's own takes torch's random state, which is another one in a run that is resumed.

    Args:
        batch_size: examples of a step.
        lengths: of all examples.
        seed: of the order.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch."""
        self._epoch = epoch

    def __iter__(self) -> Any:
        """Yield the indices of the epoch."""
        self.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return super().__iter__()


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
