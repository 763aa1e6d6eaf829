"""Look at verdicts, export and import them, and see what came of training on them.

    python -m llama_squad.feedback                                 # what data/feedback.jsonl holds
    python -m llama_squad.feedback --export data/feedback.json     # and .provenance.json beside it
    python -m llama_squad.feedback --import theirs.json --reviewer Ada
    python -m llama_squad.feedback --before results/results.csv --after results/after.csv

The verdicts themselves are given on the page (``app.py``), and trained on by configs/feedback.yaml.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llama_squad.feedback import exchange, outcome, verdicts

DEFAULT_FILE = "data/feedback.jsonl"


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line asks for, then say what the file holds."""
    parser = argparse.ArgumentParser(
        "python -m llama_squad.feedback", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--feedback", metavar="FILE", default=DEFAULT_FILE, help=f"Verdicts ({DEFAULT_FILE}).")
    add("--export", metavar="FILE", help="Write the questions with an answer here.")
    add("--import", metavar="FILE", dest="source",
        help="Append a labelled file, of any form, or the verdicts of another.")  # fmt: skip
    add("--reviewer", metavar="NAME", default=None, help="Who labelled it (default: you).")
    add("--before", metavar="FILE", help="Compare this result file of test_llama_squad.py ...")
    add("--after", metavar="FILE", help="... with this: the corrected questions, and the others.")
    args = parser.parse_args(argv)
    if (args.before is None) != (args.after is None):
        parser.error("--before and --after go together: the result files to compare")
    try:
        if args.export:
            read = (args.feedback, args.source, args.before, args.after)
            check_export(args.export, [name for name in read if name])
        if args.source:
            reviewer = args.reviewer or verdicts.user_name()
            new, there = exchange.import_file(args.source, args.feedback, reviewer)
            print(f"{new:,} questions taken in, {there:,} were there already.")
        feedback = verdicts.load(args.feedback)
        if args.export:
            number = exchange.export(feedback, args.export)
            beside = exchange.provenance_path(args.export)
            print(f"{number:,} questions written to {args.export}; whose they are, to {beside}.")
        print(describe(feedback, args.feedback))
        if args.before:
            print(outcome.describe(outcome.compare(feedback, args.before, args.after)))
    except ValueError as error:
        sys.exit(f"python -m llama_squad.feedback: {error}")


def check_export(path: str, read: Sequence[str]) -> None:
    """Refuse to write over what is read, such as the verdicts. Raises ValueError."""
    for written in (Path(path), exchange.provenance_path(path)):
        if written.resolve() in {Path(name).resolve() for name in read}:
            raise ValueError(
                f"--export {path} would write over {written}, which is read: name another file"
            )


def describe(feedback: verdicts.Feedback, path: str) -> str:
    """Say in a line or two what a feedback file holds."""
    counts = ", ".join(f"{number:,} {kind}" for kind, number in feedback.counts().items())
    several, agreed = feedback.agreement()
    lines = [f"{path}: {len(feedback.latest()):,} questions judged ({counts or 'none yet'})."]
    if several:
        lines.append(
            f"{several:,} were judged more than once: {several - agreed:,} conflicts, in which the "
            "latest verdict counts."
        )
    if feedback.torn:
        lines.append(
            f"A last line of {feedback.torn} bytes is half-written and not read: the next verdict "
            f"moves it to {verdicts.torn_path(path)}."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
