"""A result file against another, question by question: the differences and their intervals.

Two models mostly fail on the same questions, so a difference is known better than the intervals of
both figures suggest. Standard library only.
"""

from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

from llama_squad.intervals import Z_95, standard_error
from llama_squad.metrics import is_exact_match, score_answer
from llama_squad.rows import Row, row_answer
from llama_squad.summary import question_digest


class Score(NamedTuple):
    """What a question is worth: strict equality, and the official exact and F1, in [0, 1]."""

    has_answer: bool
    strict: float
    exact: float
    f1: float


FIGURES: dict[str, tuple[Callable[[Score], float], Callable[[Score], bool]]] = {
    "% Exact Match": (lambda s: s.strict, lambda s: True),
    "exact": (lambda s: s.exact, lambda s: True),
    "f1": (lambda s: s.f1, lambda s: True),
    "HasAns_f1": (lambda s: s.f1, lambda s: s.has_answer),
    "NoAns_exact": (lambda s: s.exact, lambda s: not s.has_answer),
}
"""What is compared: a question's share of a figure, and which questions count for it."""


class QuestionScores:
    """The scores of a file's questions, told apart by their id, words and right answers.

    ``named``: the file tells the words; the original's files number their rows alone.
    """

    def __init__(self) -> None:
        self._scores: dict[int, Score] = {}
        self.named = False

    def add(self, row: Row) -> None:
        """Count a row in."""
        golds, answer = row["answers"], row_answer(row)
        exact, f1 = score_answer(answer.official, golds)
        score = Score(bool(golds), is_exact_match(answer, golds), exact, f1)
        self._scores[question_digest(row)] = score
        self.named = self.named or bool(row["question"])

    def less(self, first: "QuestionScores") -> dict[str, Any] | None:
        """Return the differences to a first file, in points; None where no question is in both.

        Returns:
            "n", the questions in both files; "difference": figure → mean difference, and
            "intervals": figure → [low, high], normal and paired, at 95 % (not for a figure that
            fewer than two questions count for); "became right" and "became wrong": how many
            questions, by strict equality.
        """
        pairs = [(was, now) for key, now in self._scores.items() if (was := first._scores.get(key))]
        if not pairs:
            return None
        found: dict[str, Any] = {"n": len(pairs), "difference": {}, "intervals": {}}
        for name, (value, counts) in FIGURES.items():
            changes = array("d", (value(now) - value(was) for was, now in pairs if counts(now)))
            if len(changes) > 1:
                mean, half = sum(changes) / len(changes), Z_95 * standard_error(changes)
                found["difference"][name] = 100.0 * mean
                found["intervals"][name] = [100.0 * (mean - half), 100.0 * (mean + half)]
        strict = [now.strict - was.strict for was, now in pairs]
        return found | {"became right": strict.count(1), "became wrong": strict.count(-1)}


class Differences:
    """The differences of result files to the first of them, which alone is kept."""

    def __init__(self) -> None:
        self._first: tuple[str, QuestionScores] | None = None

    def to_first(self, name: str, scores: QuestionScores) -> dict[str, Any]:
        """Return {"paired": a file's differences to the first}; nothing for the first itself.

        Raises:
            ValueError: the file does not name its questions, or holds none of the first.
        """
        if not scores.named:
            raise ValueError(
                f"--paired: {name} numbers its rows and names no questions, as the original's "
                "files do, so which are the same as another file's is not known"
            )
        if self._first is None:
            self._first = name, scores
            return {}
        to, first = self._first
        found = scores.less(first)
        if found is None:
            raise ValueError(
                f"--paired: {name} and {to} have no question in common (by id, words and right "
                "answers): evaluate the same split of the same dataset"
            )
        return {"paired": {"to": to, **found}}
