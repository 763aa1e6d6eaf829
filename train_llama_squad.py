"""Fine-tune a chat model on the dataset: QLoRA through TRL, with the loss on the JSON answers only.

Reads the dataset folder and the base model; writes checkpoints and logs to ``--output_dir``
(results), the adapter with tokenizer, run configuration and model card to its
``final_checkpoints``, and with ``--merge_and_push`` the merged model to its
``final_merged_checkpoint``.

    python train_llama_squad.py --model_name meta-llama/Llama-2-7b-chat-hf --merge_and_push
    python train_llama_squad.py --show_mask 3
    torchrun --nproc_per_node 8 train_llama_squad.py
"""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from llama_squad.config import ModelArguments, TrainArguments, parse_stage


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    from llama_squad.training import SquadSFTConfig, check_flags

    types = (TrainArguments, ModelArguments, SquadSFTConfig)
    args, model_args, sft_args = parse_stage("train", types, argv, description=__doc__)
    try:
        check_flags(args, sys.argv[1:] if argv is None else argv)
        if args.show_mask:
            show_mask(args, model_args)
        else:
            train(args, model_args, sft_args)
    except ValueError as error:
        sys.exit(f"train_llama_squad.py: {error}")


def show_mask(args: TrainArguments, model_args: ModelArguments) -> None:
    """Print examples with their supervised tokens in colour."""
    from llama_squad import modeling
    from llama_squad.collator import colour_labels
    from llama_squad.data import load_squad

    dataset = load_squad(args.dataset_name)
    if "train" not in dataset:
        raise ValueError(
            f"{args.dataset_name} has no train split, only {', '.join(dataset)}: build it with "
            "create_squad_dataset.py --train_files"
        )
    split = dataset["train"]
    encoder = modeling.load_encoder(model_args, args.reasoning_tokens)
    for row in split.select(range(min(args.show_mask, len(split)))):
        (example,) = encoder.encode([row["messages"]])
        print(colour_labels(encoder.tokenizer, example), end="\n\n")
    print("The tokens in green are trained; the others are read only.")


def train(args: TrainArguments, model_args: ModelArguments, sft_args: Any) -> None:
    """Train, save the adapter, and merge and push it where asked."""
    from transformers import set_seed

    from llama_squad import modeling, preflight, publishing, rows, training
    from llama_squad.collator import SquadDataCollator
    from llama_squad.data import load_squad
    from llama_squad.merge_error import Sample

    # TRL and PEFT still use names that transformers 5 renames
    warnings.filterwarnings("ignore", message=".*will be removed in v6.*", category=FutureWarning)
    # and warns of what label smoothing costs in its own loss, which is not ours
    warnings.filterwarnings("ignore", message=".*label_smoothing_factor.*", category=FutureWarning)
    publishing.check_output(model_args.model_name, sft_args.output_dir)
    preflight.check_hub(sft_args)
    modeling.say_device()
    settings = publishing.run_settings(args, model_args, sft_args.to_dict())
    set_seed(sft_args.seed)
    checkpoint = training.find_checkpoint(sft_args.resume_from_checkpoint, sft_args.output_dir)
    dataset = load_squad(args.dataset_name)
    if "val" in dataset:
        dataset["val"] = rows.sample_paragraphs(dataset["val"], args.eval_samples, sft_args.seed)
    encoder = modeling.load_encoder(model_args, args.reasoning_tokens)
    with sft_args.main_process_first(desc="encoding"):
        encoded = rows.encode_dataset(dataset, encoder, sft_args.max_length)
    model = training.prepare_model(args, model_args, encoder)
    collator = SquadDataCollator(
        pad_token_id=encoder.tokenizer.pad_token_id, pad_to_multiple_of=sft_args.pad_to_multiple_of
    )
    validate = training.make_validation(sft_args, dataset, args.dataset_name, encoder)
    features = training.lay_out(args, sft_args, encoded, model, collator)
    trainer = training.SquadTrainer(
        model=model,
        args=sft_args,
        data_collator=collator,
        train_dataset=features["train"],
        eval_dataset=features.get("val"),
        processing_class=encoder.tokenizer,
        validate=validate,
        settings=settings,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    final = publishing.save_final(trainer, settings)
    first = trainer.is_world_process_zero()
    del trainer, model
    if args.merge_and_push and first:
        sample = Sample.take(features.get("val", features["train"]), collator)
        publishing.merge_and_push(final, args, model_args, sft_args, sample)


if __name__ == "__main__":
    main()
