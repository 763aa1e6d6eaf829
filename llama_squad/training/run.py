"""A training run, from the dataset to the saved adapter, and to the merged model where asked."""

from pathlib import Path
from typing import Any

from transformers import set_seed

from llama_squad import modeling
from llama_squad.arguments import ModelArguments, TrainArguments
from llama_squad.collator import SquadDataCollator
from llama_squad.data import load_squad, sample_paragraphs
from llama_squad.encoding import ChatEncoder
from llama_squad.stage import if_interrupted
from llama_squad.training import checkpoints, preflight, publishing
from llama_squad.training.chat_share import add_chat, chat_examples
from llama_squad.training.examples import encode_dataset
from llama_squad.training.merge_error import Sample
from llama_squad.training.setup import lay_out, make_validation, prepare_model
from llama_squad.training.trainer import SquadTrainer


def train(args: TrainArguments, model_args: ModelArguments, sft_args: Any) -> Path:
    """Train, save the adapter, and merge and push it where asked; return the adapter's folder."""
    preflight.check_hub(sft_args)
    modeling.choose_device()
    settings = publishing.run_settings(args, model_args, sft_args.to_dict())
    set_seed(sft_args.seed)
    checkpoint = checkpoints.find_checkpoint(sft_args.resume_from_checkpoint, sft_args.output_dir)
    dataset = _load_dataset(args, sft_args)
    encoder = modeling.load_encoder(
        model_args, args.reasoning_tokens, args.from_adapter, args.filler
    )
    record = checkpoints.run_record(settings, dataset["train"], encoder, sft_args.world_size)
    if checkpoint:
        checkpoint = checkpoints.own_checkpoint(checkpoint, sft_args, record)
    differ = checkpoints.check_resume(checkpoint, record, args.resume_anyway)
    encoded = _encode(dataset, encoder, args, sft_args, settings.get("prompt", "single_turn"))
    model = prepare_model(args, model_args, encoder)
    made: dict[str, Any] = {}  # what the record cannot hold before the model is there
    if args.chat_share:
        of_base = {"model_args": model_args, "system_prompt": settings.get("system_prompt", "")}
        made["chat"] = _mix_chat(encoded, model, encoder, args, sft_args, **of_base)
    collator = _collator(encoder, sft_args)
    validate = make_validation(sft_args, dataset, args.dataset_name, encoder)
    layout = lay_out(args, sft_args, encoded, model, collator)
    made["rows"] = layout.rows
    if not differ:  # else they are laid out otherwise, of course
        checkpoints.check_resume(checkpoint, made, args.resume_anyway)
    settings[checkpoints.RUN_RECORD] = record | made
    trainer = SquadTrainer(
        model=model,
        args=sft_args.replace(**layout.settings),
        data_collator=collator,
        train_dataset=layout.features["train"],
        eval_dataset=layout.features.get("val"),
        processing_class=encoder.tokenizer,
        validate=validate,
        settings=settings,
        chat_kl=args.chat_kl,
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


def _load_dataset(args: TrainArguments, sft_args: Any) -> Any:
    """Load the dataset, of the validation split as much as is answered at each evaluation."""
    dataset = load_squad(args.dataset_name)
    if "val" in dataset:
        dataset["val"] = sample_paragraphs(dataset["val"], args.eval_samples, sft_args.seed)
    return dataset


def _encode(
    dataset: Any, encoder: ChatEncoder, args: TrainArguments, sft_args: Any, prompt: str
) -> Any:
    """Encode all splits, the main process first: the others find it in the cache."""
    with sft_args.main_process_first(desc="encoding"):
        where = "start" if args.full_parameters else args.alora_from
        return encode_dataset(
            dataset, encoder, sft_args.max_length, prompt=prompt, adapter_from=where
        )


def _mix_chat(
    encoded: dict[str, Any],
    model: Any,
    encoder: ChatEncoder,
    args: TrainArguments,
    sft_args: Any,
    *,
    model_args: ModelArguments,
    system_prompt: str,
) -> str:
    """Add plain chat to the training split, the main process making it; return its digest."""
    with sft_args.main_process_first(desc="making chat replies"):
        chat = chat_examples(model, encoder, args, model_args, system_prompt)
    encoded["train"] = add_chat(
        encoded["train"], chat, args.chat_share, sft_args.max_length, sft_args.seed,
        marked=args.chat_kl > 0,
    )  # fmt: skip
    return checkpoints.digest(chat)


def _collator(encoder: ChatEncoder, sft_args: Any) -> SquadDataCollator:
    return SquadDataCollator(
        pad_token_id=encoder.tokenizer.pad_token_id,
        pad_to_multiple_of=sft_args.pad_to_multiple_of,
        counts=True,
    )
