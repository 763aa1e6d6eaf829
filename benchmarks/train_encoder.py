"""Train an encoder on SQuAD 2.0 to compare the chat model with: the usual choice for the task.

Any encoder on the Hub or on disk gets a span head and learns by the standard recipe (Devlin et al.
2019, section 4.3): windows of question and context, the answer's first and last token, and the
first token of all, [CLS], where the window holds no answer. The questions come from the train split
of ``create_squad_dataset.py``: those that an adapter has seen (``--questions_of``), or whole
paragraphs at random; they are shuffled. On CPUs that multiply in bfloat16 it computes in it, with
weights in float32. The same command resumes from the newest complete checkpoint. What it leaves in
``--output_dir``, ``--predictor encoder`` evaluates:

    python benchmarks/train_encoder.py --model FOLDER --questions_of ADAPTER
    python test_llama_squad.py --predictor encoder --model_name results/encoder
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from trained_on import trained_on
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llama_squad import modeling
from llama_squad.config import write_json
from llama_squad.data import load_squad, sample_paragraphs
from llama_squad.training.checkpoints import find_checkpoint

WINDOW, STRIDE, QUESTION = 384, 128, 64
"""Tokens of a window, of its overlap with the next, of a question at most: as evaluation has it."""

_CONTEXT = 1
"""The context's number among the two texts of a window."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="encoder: a folder, or a name on the Hub")
    parser.add_argument("--dataset_name", default="data/squad_v2", help="dataset's folder")
    parser.add_argument("--output_dir", default="results/encoder")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--questions", type=int, default=0, help="to train on (0: all)")
    chosen.add_argument("--questions_of", metavar="ADAPTER", help="train on those that it has seen")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=16, help="windows per step")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--save_steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(argv)


def cut_questions(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> list[str]:
    """Return questions without what is beyond their first ``QUESTION`` tokens."""
    encoded = tokenizer(
        [question.strip() for question in questions], add_special_tokens=False, truncation=True,
        max_length=QUESTION, return_offsets_mapping=True,
    )  # fmt: skip
    return [
        question.strip()[: max((end for _, end in offsets), default=0)]
        for question, offsets in zip(questions, encoded["offset_mapping"], strict=True)
    ]


def windows(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Cut records to windows, each with its ``start_positions`` and ``end_positions``.

    They are the tokens in which the first answer begins and ends, or 0, the first token of all,
    where the window does not hold the whole answer, or there is none.
    """
    encoded = tokenizer(
        cut_questions(tokenizer, [record["question"] for record in records]),
        [record["context"] for record in records],
        truncation="only_second", max_length=WINDOW, stride=STRIDE,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    found = []
    for index, owner in enumerate(encoded["overflow_to_sample_mapping"]):
        answers = records[owner]["answers"]
        first = last = 0
        if answers["text"]:
            begin = answers["answer_start"][0]
            end = begin + len(answers["text"][0])
            places = [
                place if part == _CONTEXT else (0, 0)
                for place, part in zip(
                    encoded["offset_mapping"][index], encoded.sequence_ids(index), strict=True
                )
            ]
            first = next((i for i, (a, b) in enumerate(places) if a <= begin < b), 0)
            last = next((i for i, (a, b) in enumerate(places) if a < end <= b), 0)
            if not (first and last):
                first = last = 0
        inputs = {name: encoded[name][index] for name in tokenizer.model_input_names}
        found.append({**inputs, "start_positions": first, "end_positions": last})
    return found


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    """Return the trainer's settings: a tenth of the steps to warm up, then down in a line."""
    return TrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,
        weight_decay=0.01,
        bf16=modeling.resolve_dtype("auto") == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="group_by_length",
        save_steps=args.save_steps,
        save_total_limit=1,
        logging_steps=25,
        report_to="none",
        seed=args.seed,
    )


def load(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, Any, list[dict[str, Any]]]:
    """Return the tokenizer, the model with a new span head, and the shuffled questions.

    Raises OSError or ValueError where the encoder or the dataset is not there.
    """
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    split = load_squad(args.dataset_name)["train"]
    if args.questions_of:
        chosen = split.select(trained_on(args.questions_of, split))
    else:
        chosen = sample_paragraphs(split, args.questions, args.seed)
    records = chosen.to_list()
    random.Random(args.seed).shuffle(records)
    torch.manual_seed(args.seed)  # of the span head, which transformers lists as new
    model = AutoModelForQuestionAnswering.from_pretrained(args.model, dtype=torch.float32)
    return tokenizer, model, records[: args.questions or None]


def resume_point(args: argparse.Namespace) -> str | None:
    """Return the checkpoint to resume from, and keep what the run was asked for beside it.

    Raises ValueError where a checkpoint is there that was made with other flags.
    """
    checkpoint = find_checkpoint("auto", args.output_dir)
    asked = {k: v for k, v in vars(args).items() if k not in ("output_dir", "save_steps")}
    file = Path(args.output_dir, "asked.json")
    if checkpoint and file.is_file():
        found = json.loads(file.read_text("utf-8"))
        differ = sorted(name for name in asked if found.get(name) != asked[name])
        if differ:
            raise ValueError(
                f"{checkpoint} was made with another --{', --'.join(differ)}: give the same, or "
                "another --output_dir"
            )
    write_json(file, asked)
    return checkpoint


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and save the encoder with its tokenizer."""
    args = parse(argv)
    try:
        tokenizer, model, records = load(args)
        checkpoint = resume_point(args)
    except (OSError, ValueError) as error:
        sys.exit(f"train_encoder.py: {error}")
    features = windows(tokenizer, records)
    held = sum(feature["end_positions"] > 0 for feature in features)
    print(f"{len(records):,} questions in {len(features):,} windows, {held:,} with an answer")
    trainer = Trainer(
        model=model,
        args=training_arguments(args),
        train_dataset=features,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    before = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    began = time.process_time()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.process_time() - began
    trainer.save_model(args.output_dir)
    done = (trainer.state.global_step - before) / trainer.state.max_steps
    questions = done * args.epochs * len(records)
    print(
        f"{questions:,.0f} questions in {seconds:,.0f} s of CPU time, "
        f"{questions / seconds:.1f} a second, {torch.get_num_threads()} threads"
    )
    print(f"Wrote {args.output_dir}")


if __name__ == "__main__":
    main()
