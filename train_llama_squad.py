"""Fine-tune a chat model on the dataset: QLoRA through TRL, with the loss on the JSON answers only.

Reads the dataset folder and the base model; writes checkpoints and logs to ``--output_dir``
(results), the adapter with tokenizer, run configuration and model card to its
``final_checkpoints``, and with ``--merge_and_push`` the merged model to its
``final_merged_checkpoint``.

    python train_llama_squad.py --model_name meta-llama/Llama-2-7b-chat-hf --merge_and_push
    python train_llama_squad.py --show_mask 3
    python train_llama_squad.py --config configs/feedback.yaml
    torchrun --nproc_per_node 8 train_llama_squad.py
"""

import contextlib
import dataclasses
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llama_squad.arguments import ModelArguments, TrainArguments, TrainerArguments
from llama_squad.checks import check_activated, check_training
from llama_squad.config import parse_stage
from llama_squad.durable import hold
from llama_squad.flags import sft_config_fields
from llama_squad.stage import if_interrupted, next_command, run_stage


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    argv = sys.argv[1:] if argv is None else argv
    own = (TrainArguments, ModelArguments, TrainerArguments)
    try:  # before TRL is loaded, which takes ten seconds
        check = partial(check_training, argv)
        later = sft_config_fields()
        parse_stage(
            "train", own, argv, adapter_settings, description=__doc__, check=check, later=later
        )
        from llama_squad.training.arguments import REPLACED, SquadSFTConfig

        args, model_args, sft_args = parse_stage(
            "train", (*own[:2], SquadSFTConfig), argv, adapter_settings, description=__doc__,
            hidden=REPLACED,
        )  # fmt: skip
        if args.show_mask:
            show_mask(args, model_args)
            return
        from llama_squad.training.checkpoints import what_is_kept
        from llama_squad.training.run import train

        first, folder = sft_args.process_index == 0, sft_args.output_dir
        lock = Path(folder, ".lock")
        alone = hold(lock, folder, "--output_dir") if first else contextlib.nullcontext()
        with if_interrupted(partial(what_is_kept, sft_args, time.time())), alone:
            final = train(args, model_args, sft_args)
    except ValueError as error:
        sys.exit(f"train_llama_squad.py: {error}")
    if first:
        test = next_command("test", argv, adapter_name=str(final), dataset_name=args.dataset_name)
        print(f"Next: {test}")


def adapter_settings(parsed: Sequence[Any]) -> Mapping[str, Any]:
    """Return what the adapter that training goes on from brings. Raises ValueError: see there."""
    args = parsed[0]
    if not args.from_adapter:
        return {}
    from llama_squad.config import load_run_config
    from llama_squad.weights import lora_settings

    brought = lora_settings(args.from_adapter)
    created = load_run_config(args.dataset_name).get("create", {})
    for name in ("prompt", "system_prompt"):
        here, there = created.get(name), brought.pop(name, None)
        if None not in (here, there) and here != there:
            raise ValueError(
                f"{args.dataset_name} has the {name} {here!r}, and {args.from_adapter} was trained "
                f"on {there!r}: create the dataset anew with --{name} {shlex.quote(there)}"
            )
    check_activated(dataclasses.replace(args, alora_from=brought["alora_from"]))
    return brought


def show_mask(args: TrainArguments, model_args: ModelArguments) -> None:
    """Print examples with their supervised tokens in colour."""
    from llama_squad import modeling
    from llama_squad.collator import colour_labels
    from llama_squad.data import load_squad
    from llama_squad.encoding import label_all

    split = load_squad(args.dataset_name)["train"]
    encoder = modeling.load_encoder(
        model_args, args.reasoning_tokens, args.from_adapter, args.filler
    )
    for row in split.select(range(min(args.show_mask, len(split)))):
        (example,) = encoder.encode([row["messages"]])
        example = label_all(example) if args.loss_on == "all" else example
        print(colour_labels(encoder.tokenizer, example), end="\n\n")
    print("The tokens in green are trained; the others are read only.")


if __name__ == "__main__":
    run_stage(main)
