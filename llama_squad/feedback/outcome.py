"""What came of corrections: the corrected questions, and all others, before and after training."""

import math
from dataclasses import dataclass
from pathlib import Path

from llama_squad.feedback.verdicts import Feedback, Verdict
from llama_squad.intervals import Z_95, standard_error
from llama_squad.metrics import score_answer
from llama_squad.result_reader import iter_results
from llama_squad.rows import Row, row_answer

Score = tuple[int, float]
"""The official exact and F1 of one question, in [0, 1]."""


@dataclass(frozen=True)
class Outcome:
    """Scores of the questions that two result files share, each (before, after).

    Attributes:
        corrected: of those that a reviewer answered, by the reviewer's answer and the dataset's.
        others: of all others, by the dataset's answers: what was not corrected.
    """

    corrected: tuple[tuple[Score, Score], ...]
    others: tuple[tuple[Score, Score], ...]


def compare(feedback: Feedback, before: str | Path, after: str | Path) -> Outcome:
    """Score the questions that two result files share.

    Raises:
        ValueError: one is no result file, or they share no question.
    """
    answered = {(v.id, v.question): v for v in feedback.latest().values() if v.answers}
    first = {(row["id"], row["question"]): row for row in iter_results(before)}
    corrected: list[tuple[Score, Score]] = []
    others: list[tuple[Score, Score]] = []
    for row in iter_results(after):
        key = row["id"], row["question"]
        if key in first:
            verdict = answered.get(key)
            pair = _score(first[key], verdict), _score(row, verdict)
            (others if verdict is None else corrected).append(pair)
    if not corrected and not others:
        raise ValueError(
            f"{before} and {after} share no question: evaluate the same split of the same dataset, "
            "with the same --num_samples, --shuffle, --sample and --seed"
        )
    return Outcome(tuple(corrected), tuple(others))


def _score(row: Row, verdict: Verdict | None) -> Score:
    golds = row["answers"] if verdict is None else verdict.record()["answers"]["text"]
    return score_answer(row_answer(row).official, golds)


def describe(outcome: Outcome) -> str:
    """Say in a few lines what came of it, with 95 % intervals of the paired differences."""
    corrected, others = outcome.corrected, outcome.others
    lines = [
        f"Of {len(corrected):,} reviewed questions {sum(b[0] for b, _ in corrected):,} were right "
        f"before, and {sum(a[0] for _, a in corrected):,} are after."
        if corrected
        else "None of the reviewed questions is in both files."
    ]
    if not others:
        return "\n".join([*lines, "No other question is in both files."])
    lines.append(f"{len(others):,} other questions:    before     after   difference")
    for place, name in enumerate(("exact", "F1")):
        pairs = [(before[place], after[place]) for before, after in others]
        means = [100 * math.fsum(scores) / len(pairs) for scores in zip(*pairs, strict=True)]
        half = 100 * Z_95 * standard_error([after - before for before, after in pairs])
        change = f"{means[1] - means[0]:+6.2f} ± {half:.2f}"
        lines.append(f"  {name:26} {means[0]:6.2f}    {means[1]:6.2f}   {change}")
    changes = [after[0] - before[0] for before, after in others]
    lines.append(f"  {changes.count(1):,} became right (exact), {changes.count(-1):,} wrong.")
    return "\n".join(lines)
