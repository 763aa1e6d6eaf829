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

import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llama_squad.arguments import (
    ModelArguments,
    TrainArguments,
    TrainerArguments,
    check_adapter_flags,
    check_training_numbers,
)
from llama_squad.config import parse_stage
from llama_squad.flags import sft_config_fields
from llama_squad.folders import check_dataset, check_file, check_output, check_weights
from llama_squad.stage import if_interrupted, next_command, run_stage


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    argv = sys.argv[1:] if argv is None else argv
    own = (TrainArguments, ModelArguments, TrainerArguments)
    try:  # before TRL is loaded, which takes ten seconds
        check = partial(check_flags, argv)
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
        with if_interrupted(partial(what_is_kept, sft_args, time.time())):
            final = train(args, model_args, sft_args)
    except ValueError as error:
        sys.exit(f"train_llama_squad.py: {error}")
    if sft_args.process_index == 0:
        test = next_command("test", argv, adapter_name=str(final), dataset_name=args.dataset_name)
        print(f"Next: {test}")


def check_flags(argv: Sequence[str], parsed: Sequence[Any]) -> None:
    """Check what can be checked before anything is loaded. Raises ValueError."""
    if "--help_all" in argv:  # which the parser with all flags takes
        return
    args, model_args, trainer = parsed
    check_training_numbers(args, trainer)
    check_adapter_flags(args, argv)
    check_output("--model_name", model_args.model_name, trainer.output_dir)
    if args.from_adapter:
        check_output("--from_adapter", args.from_adapter, trainer.output_dir)
    if args.resume_anyway and not trainer.resume_from_checkpoint:
        raise ValueError("--resume_anyway needs --resume_from_checkpoint: nothing is gone on from")
    create = next_command("create", argv, dataset_name=args.dataset_name)
    check_dataset(args.dataset_name, ["train"], create)
    another = "give another folder, or a name on the Hub"
    check_weights("--from_adapter", args.from_adapter, another)
    if not args.from_adapter:  # which brings its base
        check_weights("--model_name", model_args.model_name, another)
    check_file("--chat_template", model_args.chat_template)


def adapter_settings(parsed: Sequence[Any]) -> Mapping[str, Any]:
    """Return what the adapter that training goes on from brings. Raises ValueError: see there."""
    args = parsed[0]
    if not args.from_adapter:
        return {}
    from llama_squad.config import load_run_config
    from llama_squad.modeling import lora_settings

    brought = lora_settings(args.from_adapter)
    prompts = (load_run_config(args.dataset_name).get("create", {}).get("prompt"),
               brought.pop("prompt", None))  # fmt: skip
    if None not in prompts and prompts[0] != prompts[1]:
        raise ValueError(
            f"{args.dataset_name} has {prompts[0]} prompts, and {args.from_adapter} was trained on "
            f"{prompts[1]}: create the dataset anew with --prompt {prompts[1]}"
        )
    return brought


def what_is_kept(sft_args: Any, started: float) -> str:
    """Say what an interrupted run leaves, and how to go on with it."""
    from llama_squad.training.checkpoints import find_checkpoint, newest_checkpoint

    asked = sft_args.resume_from_checkpoint
    checkpoint = newest_checkpoint(sft_args.output_dir, started)
    checkpoint = checkpoint or find_checkpoint(asked, sft_args.output_dir)
    if not checkpoint:
        return "no checkpoint is written yet (see --save_steps): the same command starts anew"
    return (
        f"{checkpoint} is kept: the same command with --resume_from_checkpoint {checkpoint} goes "
        "on from there"
    )


def show_mask(args: TrainArguments, model_args: ModelArguments) -> None:
    """Print examples with their supervised tokens in colour."""
    from llama_squad import modeling
    from llama_squad.collator import colour_labels
    from llama_squad.data import load_squad

    split = load_squad(args.dataset_name)["train"]
    encoder = modeling.load_encoder(model_args, args.reasoning_tokens)
    for row in split.select(range(min(args.show_mask, len(split)))):
        (example,) = encoder.encode([row["messages"]])
        print(colour_labels(encoder.tokenizer, example), end="\n\n")
    print("The tokens in green are trained; the others are read only.")


def train(args: TrainArguments, model_args: ModelArguments, sft_args: Any) -> Path:
    """Train, save the adapter, and merge and push it where asked; return the adapter's folder."""
    from transformers import set_seed

    from llama_squad import modeling
    from llama_squad.collator import SquadDataCollator
    from llama_squad.data import load_squad, sample_paragraphs
    from llama_squad.training import checkpoints, preflight, publishing
    from llama_squad.training.merge_error import Sample
    from llama_squad.training.packing import encode_dataset
    from llama_squad.training.setup import lay_out, make_validation, prepare_model
    from llama_squad.training.trainer import SquadTrainer

    preflight.check_hub(sft_args)
    modeling.say_device()
    settings = publishing.run_settings(args, model_args, sft_args.to_dict())
    set_seed(sft_args.seed)
    checkpoint = checkpoints.find_checkpoint(sft_args.resume_from_checkpoint, sft_args.output_dir)
    dataset = load_squad(args.dataset_name)
    if "val" in dataset:
        dataset["val"] = sample_paragraphs(dataset["val"], args.eval_samples, sft_args.seed)
    encoder = modeling.load_encoder(model_args, args.reasoning_tokens)
    record = checkpoints.make_record(settings, dataset["train"], encoder, sft_args.world_size)
    differ = checkpoints.check_resume(checkpoint, record, args.resume_anyway)
    with sft_args.main_process_first(desc="encoding"):
        encoded = encode_dataset(dataset, encoder, sft_args.max_length)
    model = prepare_model(args, model_args, encoder)
    collator = SquadDataCollator(
        pad_token_id=encoder.tokenizer.pad_token_id, pad_to_multiple_of=sft_args.pad_to_multiple_of
    )
    validate = make_validation(sft_args, dataset, args.dataset_name, encoder)
    layout = lay_out(args, sft_args, encoded, model, collator)
    record["rows"] = layout.rows
    if not differ:  # else they are laid out otherwise, of course
        checkpoints.check_resume(checkpoint, {"rows": layout.rows}, args.resume_anyway)
    settings[checkpoints.RECORD] = record
    trainer = SquadTrainer(
        model=model,
        args=sft_args.replace(**layout.settings),
        data_collator=collator,
        train_dataset=layout.features["train"],
        eval_dataset=layout.features.get("val"),
        processing_class=encoder.tokenizer,
        validate=validate,
        settings=settings,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    final = publishing.save_final(trainer, settings)
    first = trainer.is_world_process_zero()
    del trainer, model
    if args.merge_and_push and first:
        sample = Sample.take(layout.features.get("val", layout.features["train"]), collator)
        with if_interrupted(f"{final} is complete, but neither merged nor pushed"):
            publishing.merge_and_push(final, args, model_args, sft_args, sample)
    return final


if __name__ == "__main__":
    run_stage(main)
