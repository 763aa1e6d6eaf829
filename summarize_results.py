"""Summarise result files: the table of strict columns and official SQuAD 2.0 figures.

Reads:   the CSV files that ``test_llama_squad.py`` writes (or the original repository's), or an
         official dataset with a prediction file of any system.
Writes:  the table to the terminal, to ``--output``, and plots to ``--plot``.

    python summarize_results.py
    python summarize_results.py base=results/base.csv tuned=results/results.csv --format markdown
    python summarize_results.py --data dev.json --predictions pred.json --format json
"""

import dataclasses
import hashlib
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_squad.config import parse_stage
from llama_squad.metrics import ScoreTable, gold_texts, score_predictions, score_table
from llama_squad.plots import plot_na_probs
from llama_squad.report import Format, describe_differing, render_figures, render_summaries
from llama_squad.result_reader import iter_results
from llama_squad.results import one_line_errors
from llama_squad.rows import Row, rethreshold
from llama_squad.stage import run_stage
from llama_squad.summary import Tally


@dataclasses.dataclass(frozen=True)
class SummarizeArguments:
    """What ``summarize_results.py`` takes."""

    results: list[str] = dataclasses.field(
        default_factory=lambda: ["results/results.csv"],
        metadata={
            "help": "Result files, one row each; NAME=FILE names the row. They may also stand "
            "first on the command line, without the flag."
        },
    )
    format: Format = dataclasses.field(default="table", metadata={"help": "Form of the summary."})
    intervals: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Show 95 %% confidence intervals below the figures, too (csv and json always "
            "hold them)."
        },
    )
    data: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Dataset in the official SQuAD JSON form, to score --predictions on."},
    )
    predictions: str | None = dataclasses.field(
        default=None, metadata={"help": "Prediction file in the official form: {id: answer}."}
    )
    na_prob: str | None = dataclasses.field(
        default=None,
        metadata={"help": "No-answer probabilities in the official form: {id: probability}."},
    )
    na_prob_thresh: float | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Abstain where the no-answer probability is above this (default: as the result "
            "file says; with --predictions 1.0, never)."
        },
    )
    output: str | None = dataclasses.field(
        default=None, metadata={"help": "Also save the summary in this file."}
    )
    plot: str | None = dataclasses.field(
        default=None, metadata={"help": "Draw the no-answer probabilities into this folder."}
    )


def read_json(path: str) -> Any:
    """Read a JSON file; a ValueError names it where that fails."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error


def name_files(files: Sequence[str]) -> dict[str, Path]:
    """Name each file: as in NAME=FILE, else its name less .csv (its folder, for a results.csv)."""
    named = []
    for file in files:
        name, _, rest = file.partition("=")
        path = Path(file if Path(file).exists() or not rest else rest)
        if path == Path(file):
            folder = path.resolve().parent.name
            own = path.stem == "results" and folder not in ("", "results")
            name = folder if own else path.name.removesuffix(".csv")
        named.append((name, path))
    count = Counter(name for name, _ in named)
    names = {name if count[name] == 1 else str(path): path for name, path in named}
    if len(names) < len(named):
        raise ValueError("two result files have one name: give each another, NAME=FILE")
    return names


def read_rows(path: Path, threshold: float | None) -> Iterator[Row]:
    """Read a result file, as another threshold would have made it where one is given."""
    for row in iter_results(path):
        try:
            yield row if threshold is None else rethreshold(row, threshold)
        except ValueError as error:
            raise ValueError(f"--na_prob_thresh cannot be applied to {path}: {error}") from error


def summarize_files(args: SummarizeArguments) -> str:
    """Summarise result files, one row each."""
    if args.data or args.na_prob:
        raise ValueError("--data and --na_prob need --predictions FILE")
    summaries, questions, unplotted = {}, {}, []
    for name, path in name_files(args.results).items():
        asked, tally = Questions(), Tally()
        for row in read_rows(path, args.na_prob_thresh):
            asked.add(row)
            tally.add(row)
        summaries[name], questions[name] = tally.figures(), asked.key()
        if args.plot:
            table = tally.weighed()
            if table is None:
                unplotted.append(str(path))
            else:
                plot_file(table, args.plot, name)
    if unplotted and len(unplotted) == len(summaries):
        raise ValueError(f"no --plot of {', '.join(unplotted)}: some rows have no na_prob")
    if unplotted:
        print(f"No plot of {', '.join(unplotted)}: some rows have no na_prob.", file=sys.stderr)
    summary = render_summaries(summaries, args.format, args.intervals)
    note = describe_differing(questions)
    if note and args.format in ("csv", "json"):  # which have no place for it
        print(note, end="", file=sys.stderr)
        return summary
    return f"{summary}\n{note}" if note else summary


class Questions:
    """Which questions a file answers, in any order: their number, and a digest."""

    def __init__(self) -> None:
        self._count = self._digest = 0
        self._named = False

    def add(self, row: Row) -> None:
        """Count a row's question and its right answers in."""
        text = json.dumps([row["id"], row["question"], row["answers"]])
        self._digest ^= int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())
        self._named = self._named or bool(row["question"])
        self._count += 1

    def key(self) -> tuple[int, str]:
        """Return the number and the digest: "" where the file does not name the questions.

        The original's files number their rows, and name none.
        """
        return self._count, f"{self._digest:032x}" if self._named else ""


def plot_file(table: ScoreTable, folder: str, name: str) -> None:
    """Draw one file's picture."""
    path = Path(folder, f"{name.replace('/', '_')}.png")
    with one_line_errors(path):
        plot_na_probs(table, path, name)


def score_official(args: SummarizeArguments) -> str:
    """Score an official prediction file."""
    if not args.data or not args.predictions:
        raise ValueError("--predictions needs --data FILE, the dataset to score them on")
    golds, predictions = gold_texts(read_json(args.data)), read_json(args.predictions)
    na_probs = read_json(args.na_prob) if args.na_prob else None
    threshold = 1.0 if args.na_prob_thresh is None else args.na_prob_thresh
    figures = score_predictions(golds, predictions, na_probs, threshold)
    if args.plot:
        if na_probs is None:
            raise ValueError("--plot draws no-answer probabilities: give --na_prob FILE")
        name = Path(args.predictions).stem
        plot_file(score_table(golds, predictions, na_probs), args.plot, name)
    return render_figures(figures, args.format)


def check_threshold(args: SummarizeArguments) -> None:
    """Refuse what no na_prob can be compared with. Raises ValueError.

    Other systems' files may hold any figure in the place of a probability, such as log-odds.
    """
    threshold = args.na_prob_thresh
    if threshold is None or (args.predictions and not math.isnan(threshold)):
        return
    if not 0 <= threshold <= 1:
        raise ValueError(f"--na_prob_thresh is a probability, not {threshold}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    files = list(itertools.takewhile(lambda argument: not argument.startswith("-"), argv))
    flags = ["--results", *files] if files else []
    (args,) = parse_stage(
        "summarize",
        (SummarizeArguments,),
        [*flags, *argv[len(files) :]],
        description=__doc__,
    )
    try:
        check_threshold(args)
        summary = score_official(args) if args.predictions else summarize_files(args)
        if args.output:
            with one_line_errors(args.output):
                Path(args.output).parent.mkdir(parents=True, exist_ok=True)
                Path(args.output).write_text(summary, encoding="utf-8")
    except ValueError as error:
        sys.exit(f"summarize_results.py: error: {error}")
    print(summary, end="")


if __name__ == "__main__":
    run_stage(main)
