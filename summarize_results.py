"""Summarise result files: the table of strict columns and official SQuAD 2.0 figures.

Reads:   the CSV files that ``test_llama_squad.py`` writes (or the original repository's), or an
         official dataset with a prediction file of any system.
Writes:  the table to the terminal, to ``--output``, and plots to ``--plot``.

    python summarize_results.py
    python summarize_results.py base=results/base.csv tuned=results/results.csv --paired
    python summarize_results.py --data dev.json --predictions pred.json --format json
"""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_squad.arguments import SummarizeArguments
from llama_squad.checks import check_summary
from llama_squad.config import parse_stage
from llama_squad.durable import one_line_errors
from llama_squad.metrics import ScoreTable, gold_texts, score_predictions, score_table
from llama_squad.paired import Differences, QuestionScores
from llama_squad.plots import plot_na_probs
from llama_squad.report import describe_differing, render_metrics, render_summaries
from llama_squad.result_reader import name_files, read_rows
from llama_squad.results import saved_settings
from llama_squad.stage import run_stage
from llama_squad.summary import Questions, Tally


def read_json(path: str) -> Any:
    """Read a JSON file; a ValueError names it where that fails."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error


def summarize_files(args: SummarizeArguments) -> str:
    """Summarise result files, one row each."""
    if args.data or args.na_prob:
        raise ValueError("--data and --na_prob need --predictions FILE")
    summaries, questions, unplotted, differences = {}, {}, [], Differences()
    for name, path in name_files(args.results).items():
        asked, tally, scores = Questions(), Tally(), QuestionScores()
        for row in read_rows(path, args.na_prob_thresh):
            asked.add(row)
            tally.add(row)
            if args.paired:
                scores.add(row)
        summaries[name], questions[name] = tally.metrics(), asked.key()
        summaries[name]["settings"] = saved_settings(path)
        if args.paired:
            summaries[name] |= differences.to_first(name, scores)
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
    metrics = score_predictions(golds, predictions, na_probs, threshold)
    if args.plot:
        if na_probs is None:
            raise ValueError("--plot draws no-answer probabilities: give --na_prob FILE")
        name = Path(args.predictions).stem
        plot_file(score_table(golds, predictions, na_probs), args.plot, name)
    return render_metrics(metrics, args.format)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    files = list(itertools.takewhile(lambda argument: not argument.startswith("-"), argv))
    flags = ["--results", *files] if files else []
    argv = [*flags, *argv[len(files) :]]
    (args,) = parse_stage("summarize", (SummarizeArguments,), argv, description=__doc__)
    try:
        check_summary(args, argv)
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
