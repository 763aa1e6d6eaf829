"""Build the dataset: SQuAD records → chat messages, split into train, val and test.

Reads SQuAD v2 from the Hub, or your own files (docs/own-data.md), or the bundled sample.
Writes the folder ``--dataset_name`` (default data/squad_v2), and the counts to the terminal.

    python create_squad_dataset.py
    python create_squad_dataset.py --train_files 'my/train-*.json' --test_files my/dev.json
    python create_squad_dataset.py --feedback data/feedback.jsonl
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_squad.arguments import CreateArguments
from llama_squad.checks import check_at_least
from llama_squad.config import parse_stage
from llama_squad.folders import check_file
from llama_squad.stage import if_interrupted, next_command, run_stage

if TYPE_CHECKING:
    from llama_squad.prompts import Record
    from llama_squad.sources.cleaning import Cleaner


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    (args,) = parse_stage(
        "create", (CreateArguments,), argv, saved=files_for_sample, description=__doc__
    )
    from llama_squad import data
    from llama_squad.sources.cleaning import Cleaner

    cleaner = Cleaner(mend=args.mend, skip_bad=args.skip_bad)
    try:
        data.check_target(args.dataset_name)
        replaced = data.built_from(args.dataset_name)
        data.check_ratio(args.validation_ratio)
        if args.replay is not None and not args.feedback:
            raise ValueError("--replay needs --feedback: it says how much old data goes with it")
        check_at_least(0, args, "replay")
        check_file("--feedback", args.feedback)
        with if_interrupted(f"{args.dataset_name} is as it was: the same command starts anew"):
            splits = build(args, cleaner)
    except ValueError as error:
        sys.exit(f"create_squad_dataset.py: {error}")

    widths = {"questions": 12, "answerable": 12, "paragraphs": 12, "titles": 9}
    print(f"\n{'':6}" + "".join(f"{column:>{width}}" for column, width in widths.items()))
    for name, records in splits.items():
        counts = data.count_split(records)
        print(f"{name:6}" + "".join(f"{counts[c]:{width},}" for c, width in widths.items()))
    if "val" in splits:
        read = len(splits["train"]) + len(splits["val"])
        source = "the training source and the verdicts" if args.feedback else "the training source"
        print(f"train and val hold the {read:,} questions of {source}.")
    summary = cleaner.summary(str(Path(args.dataset_name) / data.DROPPED))
    if summary:
        print(f"\n{summary}")
    _warn_of_shared_contexts(splits)
    if replaced and replaced != data.built_from(args.dataset_name):
        print(f"\nThe dataset of {replaced} that was there is replaced: --dataset_name keeps both.")
    following = next_command(
        "train" if "train" in splits else "test", argv, dataset_name=args.dataset_name
    )
    print(f"\nWrote {args.dataset_name} ({args.prompt}). Next: {following}")


def build(args: CreateArguments, cleaner: "Cleaner") -> dict[str, list["Record"]]:
    """Read the records, split them and write the dataset; return the splits."""
    from tqdm import tqdm

    from llama_squad import data

    splits = data.read_source(args, cleaner)
    if "train" in splits:
        train, val = data.split_by_title(splits["train"], args.validation_ratio, args.seed)
        splits = {"train": train, **({"val": val} if val else {}), **splits | {"train": train}}
    if args.feedback:
        from llama_squad.feedback import exchange, verdicts

        splits = exchange.merge(
            splits, verdicts.load(args.feedback), args.feedback, cleaner,
            replay=args.replay, seed=args.seed,
        )  # fmt: skip
    questions = sum(map(len, splits.values()))
    with tqdm(total=questions, unit=" questions", desc="Writing messages") as progress:
        data.write_dataset(splits, args, progress, cleaner)
    return splits


def files_for_sample(parsed: Sequence[CreateArguments]) -> Mapping[str, Any]:
    """Return what beats the file: named files beat its ``sample``. The flag ``--sample`` stands."""
    args = parsed[0]
    return {"sample": False} if args.sample and (args.train_files or args.test_files) else {}


def _warn_of_shared_contexts(splits: Mapping[str, Sequence["Record"]]) -> None:
    from llama_squad import data

    test = splits.get("test", [])
    shared = sum(data.count_shared(splits[n], test) for n in ("train", "val") if n in splits)
    if shared:
        print(
            f"Warning: {shared:,} training questions are about a context of the test split; "
            "the test figures will flatter the model.",
            file=sys.stderr,
        )
    held_out = data.count_shared(splits.get("train", []), splits.get("val", []))
    if held_out:  # a reviewed question leaves the split that it was in, the others stay
        print(
            f"Note: {held_out:,} training questions are about a context of the val split: what was "
            "reviewed there is trained on, and the other questions of its text stay.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_stage(main)
