"""Which unanswerable questions a model rightly abstains on, by why they have no answer.

SQuAD2-CR (Lee et al. 2020, https://aclanthology.org/2020.lrec-1.667) tells for 3,106 questions of
SQuAD 2.0 dev what was done to an answerable question so that it has none. Reads a result file of
``test_llama_squad.py`` and SQuAD2-CR's table, columns "qid" and "reason".

    python benchmarks/abstentions.py RESULTS.csv reason_gold_test.tsv
"""

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llama_squad.config import write_json
from llama_squad.intervals import wilson_interval
from llama_squad.result_reader import iter_results
from llama_squad.rows import Row

CLASSES = {
    "E": "entity swapped",
    "A": "antonym",
    "N": "negation",
    "I": "no information",
    "X": "mutual exclusion",
    "#": "number swapped",
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", help="result file of test_llama_squad.py")
    parser.add_argument("classes", help="SQuAD2-CR's reason_gold_test.tsv")
    parser.add_argument("--json", help="write the figures to this file, too")
    return parser.parse_args(argv)


def read_classes(path: str) -> dict[str, str]:
    """Return the class of each question of SQuAD2-CR. Raises ValueError: it is another file."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if missing := {"qid", "reason"} - set(rows.fieldnames or ()):
            raise ValueError(f"{path} lacks the columns {sorted(missing)} of SQuAD2-CR's table")
        found = {row["qid"]: row["reason"] for row in rows}
    unknown = set(found.values()) - CLASSES.keys()
    if unknown:
        raise ValueError(f"{path} has classes that SQuAD2-CR does not: {sorted(unknown)}")
    return found


def count(rows: Iterable[Row], classes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the figures of each class that has questions, and of "all" of them.

    "n" questions, "abstained" on so many, "share" in per cent, "interval" of the share (Wilson's,
    95 %).
    """
    tried, right = Counter[str](), Counter[str]()
    for row in rows:
        name = classes.get(row["id"])
        if name is None or row["answers"]:
            continue
        for key in (name, "all"):
            tried[key] += 1
            right[key] += row["state"] == "no_answer"
    return {
        name: {
            "n": tried[name],
            "abstained": right[name],
            "share": 100 * right[name] / tried[name],
            "interval": list(wilson_interval(right[name], tried[name])),
        }
        for name in (*CLASSES, "all")
        if tried[name]
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    args = parse(argv)
    try:
        figures = count(iter_results(args.results), read_classes(args.classes))
    except (OSError, ValueError) as error:
        sys.exit(f"abstentions.py: {error}")
    if not figures:
        sys.exit(f"abstentions.py: {args.results} holds no question of {args.classes}")
    for name, found in figures.items():
        low, high = found["interval"]
        title = f"{name} {CLASSES.get(name, '')}"
        print(f"{title:20} {found['n']:6,} {found['share']:6.1f} %   [{low:.1f}, {high:.1f}]")
    if args.json:
        write_json(Path(args.json), figures)


if __name__ == "__main__":
    main()
