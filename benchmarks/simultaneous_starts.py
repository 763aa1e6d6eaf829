"""Pairs of evaluations started at once on one result file: each ends complete, or is refused.

No model: a predictor answers with the context's first word, after a moment. In every second pair
rows of a killed run stand there already, in the file and in two shards. After each pair the file
must hold each question once, as an undisturbed run leaves it.

    nice python benchmarks/simultaneous_starts.py --pairs 200
"""

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llama_squad.answers import format_answer
from llama_squad.decoding.replies import Reply
from llama_squad.evaluation import evaluate
from llama_squad.predictors.base import Batch, Prediction
from llama_squad.prompts import Record
from llama_squad.result_reader import read_results
from llama_squad.results import ResultsFile

SETTINGS = {"seed": 1}
BATCH_SIZE = 8
LARGEST_DELAY_S = 0.6
"""Between the two starts of a pair."""


class FirstWord:
    """Answers with the first word of the context."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def answer(self, batch: Batch) -> list[Prediction]:
        """Answer a batch, after some seconds."""
        time.sleep(self._seconds)
        records = [record for group in batch for record in group]
        return [Prediction(record, "prompt " * 50, self._reply(record)) for record in records]

    def _reply(self, record: Record) -> Reply:
        return Reply(format_answer(record["context"].split()[0]), [], -1.0)


def make_records(questions: int) -> list[Record]:
    """Make questions, five on each paragraph."""
    return [
        {
            "id": str(number),
            "title": "T",
            "context": f"word{number // 5} and so on",
            "question": f"What is {number}?",
            "answers": {"text": [], "answer_start": []},
        }
        for number in range(questions)
    ]


def start(records: Sequence[Record], path: Path, delay: float, seconds: float, box: Any) -> None:
    """Evaluate in this process, and put "complete" or why not into the box."""
    time.sleep(delay)
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115 - this process ends here
    try:
        model = FirstWord(seconds)
        evaluate(model, records, path, SETTINGS, batch_size=BATCH_SIZE)
        rows = read_results(path)
        box.put("complete" if len(rows) == len(records) else f"success with {len(rows)} rows")
    except Exception as error:  # whatever it is, it is told
        refused = isinstance(error, ValueError) and "another process is writing" in str(error)
        box.put("refused" if refused else f"{type(error).__name__}: {error}")


def leave_killed_run(whole: Path, path: Path, rng: random.Random) -> None:
    """Leave part of a run's rows in the file, and others in the shards of two processes."""
    rows = read_results(whole)
    rng.shuffle(rows)
    parts = sorted(rng.sample(range(len(rows)), 3))
    names = [path.name, f".{path.name}.shard0", f".{path.name}.shard1"]
    for name, begin, end in zip(names, [0, *parts], parts, strict=False):
        with ResultsFile(path.with_name(name), SETTINGS) as file:
            file.append(rows[begin:end])


def run_pairs(pairs: int, folder: Path, questions: int = 600, seed: int = 0) -> Counter[str]:
    """Start pairs one after the other; return how often both completed, or one was refused.

    Raises:
        RuntimeError: a pair ended in any other way.
    """
    context: Any = multiprocessing.get_context("fork")  # what is imported is imported once
    rng, records = random.Random(seed), make_records(questions)
    whole = folder / "whole.csv"
    evaluate(FirstWord(0), records, whole, SETTINGS, batch_size=BATCH_SIZE)
    counts = Counter[str]()
    for pair in range(pairs):
        path = folder / f"pair{pair}" / "results.csv"
        if pair % 2:
            leave_killed_run(whole, path, rng)
        box = context.SimpleQueue()
        delays = [0.0, rng.choice([0.0, rng.uniform(0, LARGEST_DELAY_S)])]
        seconds = rng.uniform(0, 0.004)
        processes = [
            context.Process(target=start, args=(records, path, delay, seconds, box))
            for delay in delays
        ]
        for process in processes:
            process.start()
        ends = sorted(box.get() for _ in processes)
        for process in processes:
            process.join()
        if ends not in (["complete", "complete"], ["complete", "refused"]):
            raise RuntimeError(f"pair {pair}: {'; '.join(ends)}")
        if path.read_bytes() != whole.read_bytes():
            raise RuntimeError(f"pair {pair}: the file is not that of an undisturbed run")
        counts["refused" if "refused" in ends else "both complete"] += 1
    return counts


def main() -> None:
    """Run the pairs, and print how they ended."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--questions", type=int, default=600)
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = run_pairs(args.pairs, Path(folder), args.questions)
    seconds = round(time.monotonic() - begin, 1)
    print(json.dumps({"pairs": args.pairs, "questions": args.questions, **counts,
                      "seconds": seconds}))  # fmt: skip


if __name__ == "__main__":
    main()
