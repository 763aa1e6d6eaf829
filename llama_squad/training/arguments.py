"""The fields of TRL's ``SFTConfig`` as flags: which are ours, and which are refused."""

import dataclasses
import importlib.util
import os
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from typing import Any, Self

import torch
from transformers.trainer_utils import HubStrategy
from trl import SFTConfig

from llama_squad.arguments import TrainerArguments
from llama_squad.modeling import cpu_multiplies_bfloat16
from llama_squad.training import preflight

# Flags of TRL's own data preparation, whose part is taken by our encoder and collator. Setting one
# would change nothing, so it is refused, with what does the job here.
REPLACED = {
    "packing": "questions of a paragraph share a row already (see --share_context)",
    "packing_strategy": "rows share contexts instead (see --row_tokens)",
    "padding_free": "rows that share contexts hold next to no padding already",
    "eval_packing": "questions of a paragraph share a row already",
    "completion_only_loss": "--loss_on says where the loss falls",
    "assistant_only_loss": "--loss_on says where the loss falls",
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
    "router_aux_loss_coef": "the loss is that of the answer's tokens alone",
    "hub_strategy": "what is pushed is the final folder alone, at the end",
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
        if self.use_cpu and torch.cuda.is_available():
            raise ValueError("--use_cpu does not hide the GPUs: CUDA_VISIBLE_DEVICES='' does")
        if self.bf16 is None:
            on_gpu = torch.cuda.is_available()
            able = torch.cuda.is_bf16_supported() if on_gpu else cpu_multiplies_bfloat16()
            self.bf16 = able and not self.fp16
        if self.activation_checkpointing is None:  # the new name of the same
            self.activation_checkpointing = self.gradient_checkpointing
        # Which --bf16 insists on being told; and a Mac's GPU is not what the weights are put on.
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        if self.report_to in ("auto", ["auto"]):
            self.report_to = _trackers()
        defaults = {f.name: f for f in dataclasses.fields(SFTConfig)}
        for name, reason in REPLACED.items():
            if getattr(self, name) != defaults[name].default:
                raise ValueError(f"--{name} does nothing here: {reason}")
        if self.include_num_input_tokens_seen == "non_padding":
            raise ValueError(
                "--include_num_input_tokens_seen non_padding would count masks of rows that share "
                "contexts: num_tokens in the log counts tokens"
            )
        preflight.check_deepspeed(self.deepspeed)
        super().__post_init__()
        preflight.check_zero_stage()
        preflight.check_packages(self)
        if self.fsdp:  # as accelerate does, but before the model is loaded
            os.environ["ACCELERATE_USE_FSDP"] = "true"
        self.hub_strategy = HubStrategy.END  # others push all that lies in --output_dir
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
