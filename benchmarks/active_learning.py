"""Does the review queue pay? N verdicts from its top against N at random, in a small world.

For each seed: a weak adapter is trained for a few steps on the questions of a few titles, and
answers a pool of questions of other titles. Then N of the pool get a verdict, the right answer (as
of a reviewer who never errs):

    queue   those that ``feedback.queue.doubt`` ranks first, not knowing the right answers
    errors  the same, knowing them, as of a labelled split: what is answered wrongly comes first
    random  any

and the loop goes on from the weak adapter with them, as in docs/feedback.md: ``--feedback`` and
``--replay``, ``--from_adapter``, the same number of steps for each. With 0 verdicts it goes on with
the old questions alone. Figures are exact match on the quickstart's test split, span decoding.

    OMP_NUM_THREADS=1 python benchmarks/active_learning.py --json active_learning.json

Runs that ``--json`` holds already are not run again.
"""

import argparse
import contextlib
import importlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))
from llama_squad.config import write_json
from llama_squad.data import load_squad
from llama_squad.feedback import queue, verdicts
from llama_squad.result_reader import read_results
from llama_squad.rows import Row

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "quickstart" / "data"
TUNING = ["--config", "configs/quickstart.yaml"]
LOOP = ["--config", "configs/feedback.yaml"]
WAYS = ("queue", "errors", "random")
THRESHOLD = 0.5
"""Of na_prob, near which the queue takes a question to be undecided: what the page starts with."""

Results = dict[str, Any]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--verdicts", type=int, nargs="+", default=[20, 60, 180], help="N, several")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--old_titles", type=int, default=4, help="titles that the weak adapter is trained on")
    add("--pool_titles", type=int, default=12, help="titles that a reviewer may judge")
    add("--weak_steps", type=int, default=25, help="steps of the weak adapter")
    add("--steps", type=int, default=40, help="steps of going on")
    add("--learning_rate", default="1e-4", help="of going on")
    add("--replay", type=float, default=4.0, help="old questions for each verdict (100 at least)")
    add("--json", type=Path, default=Path("active_learning.json"), help="where results are kept")
    add("--work", type=Path, help="where data and adapters go (default: a temporary folder)")
    return parser.parse_args(argv)


def main() -> None:
    """Run what is not known yet, then print the tables."""
    args = parse()
    args.json, args.work = args.json.resolve(), args.work and args.work.resolve()
    results: Results = json.loads(args.json.read_text()) if args.json.exists() else {}
    settings = {k: str(v) for k, v in vars(args).items() if k in SETTINGS}
    if results.setdefault("settings", settings) != settings:
        sys.exit(f"{args.json} holds runs with {results['settings']}: name another file by --json")
    with contextlib.ExitStack() as stack, contextlib.chdir(ROOT):
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for seed in args.seeds:
            Seed(args, results, work / f"seed{seed}", seed).run()
    print(tables(results, args))


SETTINGS = ("old_titles", "pool_titles", "weak_steps", "steps", "learning_rate", "replay")


class Seed:
    """The runs of one seed: of the titles, the adapters' training and the random choice.

    Args:
        args: the command line.
        results: what is known, added to and kept in ``args.json`` after each run.
        folder: where data and adapters go.
        seed: the seed.
    """

    def __init__(self, args: argparse.Namespace, results: Results, folder: Path, seed: int) -> None:
        self._args, self._results, self._folder, self._seed = args, results, folder, seed
        self._weak = folder / "weak" / "final_checkpoints"
        self._logs = folder / "log.txt"
        self._path = args.json

    def run(self) -> None:
        """Run what is not known yet."""
        wanted = [("none", 0)] + [(w, n) for n in self._args.verdicts for w in self._args.ways]
        missing = [(w, n) for w, n in wanted if self._name(w, n) not in self._results]
        if not missing:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        old, pool = self._split_titles()
        test = str(SAMPLE / "test.json")
        self._stage("create", TUNING, "--dataset_name", self._at("pool"), *files(old, pool))
        self._stage("create", TUNING, "--dataset_name", self._at("old"), *files(old, test))
        if not self._weak.exists():
            self._train(TUNING, "old", "weak", self._args.weak_steps, "--warmup_steps", "5")
        if self._name("weak", 0) not in self._results:
            self._keep("weak", 0, self._answer("old", "weak"))
        rows = self._answer("pool", "weak", n_best=5)
        for way, number in missing:
            chosen = self._choose(way, rows)[:number]
            self._keep(way, number, self._go_on(f"{way}{number}", chosen, old, test), chosen)

    def _go_on(self, name: str, chosen: Sequence[Row], old: str, test: str) -> list[Row]:
        """Train from the weak adapter on verdicts on these; return answers to the test split."""
        data = "old"
        if chosen:
            feedback = self._folder / f"{name}.jsonl"
            feedback.unlink(missing_ok=True)
            records = {r["id"]: r for r in load_squad(self._at("pool"))["test"]}
            verdicts.append(feedback, [verdict_on(records[row["id"]], row) for row in chosen])
            data = f"data_{name}"
            self._stage(
                "create", LOOP, "--dataset_name", self._at(data), *files(old, test),
                "--feedback", str(feedback), "--replay", str(self._args.replay),
                "--seed", str(self._seed),
            )  # fmt: skip
        self._train(
            LOOP, data, name, self._args.steps, "--from_adapter", str(self._weak), "--no_quantize",
            "--learning_rate", self._args.learning_rate, "--bf16", "False",
        )  # fmt: skip
        return self._answer("old", name)

    def _choose(self, way: str, rows: Sequence[Row]) -> list[Row]:
        shuffled = random.Random(self._seed).sample(rows, len(rows))
        if way not in ("queue", "errors"):
            return shuffled
        return sorted(shuffled, key=lambda row: -worth(row, knowing=way == "errors"))

    def _split_titles(self) -> tuple[str, str]:
        """Write what the weak adapter is trained on, and the pool; return their paths."""
        articles = json.loads((SAMPLE / "train.json").read_text())["data"]
        random.Random(self._seed).shuffle(articles)
        end = self._args.old_titles
        parts = {"old": articles[:end], "pool": articles[end : end + self._args.pool_titles]}
        for name, part in parts.items():
            write_json(self._folder / f"{name}.json", {"version": "v2.0", "data": part})
        return self._at("old.json"), self._at("pool.json")

    def _train(self, config: list[str], data: str, name: str, steps: int, *flags: str) -> None:
        self._stage(
            "train", config, "--dataset_name", self._at(data), "--output_dir", self._at(name),
            "--max_steps", str(steps), "--seed", str(self._seed), "--eval_strategy", "no",
            "--report_to", "none", *flags,
        )  # fmt: skip

    def _answer(self, data: str, adapter: str, n_best: int = 1) -> list[Row]:
        """Answer the test split of a dataset, span decoding; return the rows."""
        output = self._at(f"{adapter}_on_{data}.csv")
        if data != "pool":  # those of the pool, and the weak adapter, are kept with --work
            Path(output).unlink(missing_ok=True)
        self._stage(
            "test", TUNING, "--dataset_name", self._at(data), "--output", output,
            "--adapter_name", self._at(f"{adapter}/final_checkpoints"), "--n_best", str(n_best),
        )  # fmt: skip
        return read_results(output)

    def _stage(self, stage: str, config: list[str], *flags: str) -> None:
        """Run a stage in this process, which spares its imports; what it says goes to a log."""
        script = {
            "create": "create_squad_dataset", "train": "train_llama_squad",
            "test": "test_llama_squad",
        }[stage]  # fmt: skip
        with (
            self._logs.open("a") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            importlib.import_module(script).main([*config, *flags])

    def _keep(self, way: str, number: int, rows: Sequence[Row], chosen: Sequence[Row] = ()) -> None:
        wrong = sorted(row["id"] for row in rows if not row["Exact match"])
        corrected = sum(not row["Exact match"] for row in chosen)
        result = {"n": len(rows), "wrong": wrong, "corrected": corrected}
        self._results[self._name(way, number)] = result
        write_json(self._path, self._results)
        print(
            f"{time.strftime('%H:%M:%S')} seed {self._seed} {way} {number}: "
            f"{100 - 100 * len(wrong) / len(rows):.2f} % exact",
            flush=True,
        )

    def _name(self, way: str, number: int) -> str:
        return f"{way} {number} seed {self._seed}"

    def _at(self, name: str) -> str:
        return str(self._folder / name)


def files(train: str, test: str) -> list[str]:
    """Return the flags of a dataset of two files, with no validation split."""
    return ["--train_files", train, "--test_files", test, "--validation_ratio", "0"]


def worth(row: Row, knowing: bool) -> float:
    """Return how much the queue takes a question to be worth a look.

    Args:
        row: the model's answer.
        knowing: whether the queue knows the right answers.
    """
    if knowing:
        return queue.item_of_row(row, {}, THRESHOLD).doubt.worth
    log_probs = [span["log_prob"] for span in row["n_best"] or ()]
    return queue.doubt(row["na_prob"], THRESHOLD, log_probs, right=None).worth


def verdict_on(record: dict[str, Any], row: Row) -> verdicts.Verdict:
    """Return what a reviewer who never errs says: the dataset's first answer, or that none is."""
    golds = record["answers"]
    return verdicts.Verdict(
        id=record["id"], title=record["title"], context=record["context"],
        question=record["question"], verdict="marked" if golds["text"] else "unanswerable",
        na_prob=row["na_prob"], corrected=golds["text"][0] if golds["text"] else None,
        corrected_start=golds["answer_start"][0] if golds["text"] else None, golds=golds,
        reviewer="benchmark",
    )  # fmt: skip


def tables(results: Results, args: argparse.Namespace) -> str:
    """Return the figures, and the paired differences to choosing at random, as Markdown."""
    seeds = " | ".join(f"seed {s}" for s in args.seeds)
    lines = [f"| % exact match | verdicts | of them on errors | {seeds} | mean |"]
    lines.append("|---|--:|--:|" + "--:|" * (len(args.seeds) + 1))
    rows = [("weak", 0), ("none", 0), *((w, n) for n in args.verdicts for w in args.ways)]
    for way, number in rows:
        runs = [results[f"{way} {number} seed {s}"] for s in args.seeds]
        figures = [exact(run) for run in runs]
        cells = " | ".join(f"{x:.2f}" for x in [*figures, statistics.mean(figures)])
        corrected = statistics.mean(run["corrected"] for run in runs)
        lines.append(f"| {way} | {number} | {corrected:.0f} | {cells} |")
    if "random" in args.ways:
        lines += ["", "| less random, points | verdicts | mean | standard deviation | "
                  "right only so : right only by random |", "|---|--:|--:|--:|--:|"]  # fmt: skip
        others = [w for w in args.ways if w != "random"]
        lines += [difference(results, args.seeds, w, n) for n in args.verdicts for w in others]
    return "\n".join(lines)


def difference(results: Results, seeds: Sequence[int], way: str, number: int) -> str:
    """Return a row: the differences of a way to random, by seed and by question."""
    gaps, gained, lost = [], 0, 0
    for seed in seeds:
        ours, other = (results[f"{w} {number} seed {seed}"] for w in (way, "random"))
        gaps.append(exact(ours) - exact(other))
        gained += len(set(other["wrong"]) - set(ours["wrong"]))
        lost += len(set(ours["wrong"]) - set(other["wrong"]))
    spread = f"{statistics.stdev(gaps):.2f}" if len(gaps) > 1 else "-"
    mean = statistics.mean(gaps)
    return f"| {way} | {number} | {mean:+.2f} | {spread} | {gained} : {lost} |"


def exact(run: dict[str, Any]) -> float:
    """Return the percentage of exact matches of a run."""
    return 100 - 100 * len(run["wrong"]) / run["n"]


if __name__ == "__main__":
    main()
