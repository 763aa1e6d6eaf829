"""Scores: strict string equality (the original's table) and the official SQuAD 2.0 figures.

Pure functions over the standard library. The official figures follow the published script
evaluate-v2.0.py (Rajpurkar, Jia and Liang 2018, "Know What You Don't Know", ACL,
https://rajpurkar.github.io/SQuAD-explorer/), written anew and checked against its output in
``tests/test_metrics.py``. All scores are percentages; probabilities are in [0, 1].
"""

import itertools
import math
import re
import string
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llama_squad.answers import Answer

Golds = Mapping[str, Sequence[str]]
"""Question id → its gold answers; none means the question has no answer."""
Scores = dict[str, tuple[int, float]]
"""Question id → (exact, F1), both in [0, 1]."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower the case, drop ASCII punctuation and English articles, and squeeze white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def score_answer(prediction: str, golds: Sequence[str]) -> tuple[int, float]:
    """Return the official (exact, F1) of one prediction: the best over the gold answers.

    F1 is over bags of words, and where either side has no word left it is 1 if both have none.
    A question without a gold answer that normalises to a word expects no answer, "".
    """
    wanted = {normalized for gold in golds if (normalized := normalize_answer(gold))} or {""}
    given = normalize_answer(prediction)
    if given in wanted:
        return 1, 1.0
    return 0, max(_f1(given.split(), gold.split()) for gold in wanted)


def _f1(given: list[str], gold: list[str]) -> float:
    common = (Counter(given) & Counter(gold)).total()
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def gold_texts(references: Any) -> dict[str, list[str]]:
    """Read the gold answers out of the official JSON form: the whole dict or its "data" list.

    As in the official script, a question has an answer where its "answers" is not empty
    ("is_impossible" is not looked at), and of two questions with one id the last counts.

    Raises:
        ValueError: the references are not in the official form, or hold no question.
    """
    articles: Any = references.get("data") if isinstance(references, Mapping) else references
    try:
        golds = {
            question["id"]: [answer["text"] for answer in question["answers"]]
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        }
        if not all(isinstance(text, str) for texts in golds.values() for text in texts):
            raise TypeError("the text of an answer is no string")
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"references are not in the official SQuAD form ({type(error).__name__}: {error}): "
            'expected {"data": [{"paragraphs": [{"qas": [{"id", "answers": [{"text"}]}]}]}]}'
        ) from error
    if not golds:
        raise ValueError("references hold no question")
    return golds


def evaluate_predictions(
    references: Any,
    predictions: Mapping[str, str],
    na_probs: Mapping[str, float] | None = None,
    na_prob_thresh: float = 1.0,
) -> dict[str, float]:
    """Compute the figures of the official SQuAD 2.0 scorer.

    Args:
        references: the official JSON's content, or its "data" list.
        predictions: question id → answer, "" where there is none. Ids that are not in the
            references are ignored.
        na_probs: question id → probability that the question has no answer; without them no
            best_* figure is given, and all count as 0.
        na_prob_thresh: a prediction whose probability lies above this counts as "no answer" in
            every figure but the best_* ones.

    Returns:
        exact, f1, total; HasAns_* and NoAns_* where there are such questions; with ``na_probs``
        best_exact, best_exact_thresh, best_f1 and best_f1_thresh.

    Raises:
        ValueError: references of another form; a question without a prediction or probability
            (the official script stops there too); a prediction that is no string.
    """
    return score_predictions(gold_texts(references), predictions, na_probs, na_prob_thresh)


def score_predictions(
    golds: Golds,
    predictions: Mapping[str, str],
    na_probs: Mapping[str, float] | None = None,
    na_prob_thresh: float = 1.0,
) -> dict[str, float]:
    """Compute the figures of ``evaluate_predictions`` from the gold answers themselves."""
    table = score_table(golds, predictions, na_probs)
    metrics = table.averages(na_prob_thresh)
    return metrics if na_probs is None else metrics | table.best()


def score_table(
    golds: Golds,
    predictions: Mapping[str, str],
    na_probs: Mapping[str, float] | None = None,
) -> "ScoreTable":
    """Score predictions in official form. Raises ValueError as ``evaluate_predictions`` does."""
    raw = raw_scores(golds, predictions)
    if na_probs is not None:
        _check_na_probs(golds, na_probs)
    table = ScoreTable()
    for id_ in golds if na_probs is None else na_probs:  # of which the order counts in the curve
        if id_ in golds:
            na_prob = None if na_probs is None else na_probs[id_]
            table.add(bool(golds[id_]), predictions[id_], raw[id_], na_prob)
    return table


@dataclass
class ScoreTable:
    """The scores of many questions in columns: 20 bytes per question, so that a million fit.

    Attributes:
        has_answer: 1 where there is a gold answer.
        answered: 1 where the prediction is not "".
        exact, f1: of the prediction, in [0, 1].
        na_prob: probability of "no answer"; nan where there is none.
        weights: what a question without an answer, and one with an answer, counts; see ``weigh``.
    """

    has_answer: bytearray = field(default_factory=bytearray)
    answered: bytearray = field(default_factory=bytearray)
    exact: bytearray = field(default_factory=bytearray)
    f1: "array[float]" = field(default_factory=lambda: array("d"))
    na_prob: "array[float]" = field(default_factory=lambda: array("d"))
    weights: tuple[float, float] = (1.0, 1.0)

    def __len__(self) -> int:
        return len(self.f1)

    def add(
        self,
        has_answer: bool,
        prediction: str,
        score: tuple[int, float],
        na_prob: float | None = None,
    ) -> None:
        """Add a question; ``score`` is that of ``score_answer``."""
        self.has_answer.append(has_answer)
        self.answered.append(bool(prediction))
        self.exact.append(score[0])
        self.f1.append(score[1])
        self.na_prob.append(math.nan if na_prob is None else na_prob)

    def averages(self, na_prob_thresh: float = 1.0) -> dict[str, float]:
        """Return exact, f1 and total of all, and of the questions with and without an answer.

        A prediction whose na_prob lies above the threshold (0 where there is none) counts as "".
        """
        sums: dict[bool, list[float]] = {True: [0, 0.0, 0], False: [0, 0.0, 0]}
        for has, exact, f1, na_prob in zip(
            self.has_answer, self.exact, self.f1, self.na_prob, strict=True
        ):
            if (0.0 if math.isnan(na_prob) else na_prob) > na_prob_thresh:
                exact, f1 = int(not has), float(not has)
            total = sums[bool(has)]
            total[0] += exact
            total[1] += f1
            total[2] += 1
        parts = {"": [sum(pair) for pair in zip(*sums.values(), strict=True)]}
        parts |= {"HasAns_": sums[True], "NoAns_": sums[False]}
        return {
            f"{prefix}{name}": value
            for prefix, (exact, f1, count) in parts.items()
            if count
            for name, value in (
                ("exact", 100.0 * exact / count), ("f1", 100.0 * f1 / count), ("total", int(count))
            )
        }  # fmt: skip

    def weigh(self, no_answer_share: float) -> None:
        """Let questions without an answer count as this share of all, in curve and reliability.

        Raises:
            ValueError: all are of one kind.
        """
        having = sum(self.has_answer)
        if having in (0, len(self)):
            raise ValueError("they are all of one kind: with an answer, or all without")
        share = len(self) * no_answer_share
        self.weights = share / (len(self) - having), (len(self) - share) / having

    def curve(self, index: int) -> Iterator[tuple[float, float]]:
        """Yield (threshold, score in %) by na_prob; predictions of one na_prob in their order."""
        without, having = self.weights
        correct = without * (len(self) - sum(self.has_answer))
        scores = self.f1 if index else self.exact
        yield 0.0, 100.0 * correct / len(self)
        for i in sorted(range(len(self)), key=self.na_prob.__getitem__):
            if self.has_answer[i]:
                correct += having * scores[i]
            elif self.answered[i]:
                correct -= without
            yield self.na_prob[i], 100.0 * correct / len(self)

    def auroc(self) -> float | None:
        """Return the area under na_prob's ROC curve in per cent; None without both kinds.

        How often a question without an answer has the higher na_prob of two, ties counting half.
        """
        lower, won = 0, 0.0  # of questions with an answer
        order = sorted(zip(self.na_prob, self.has_answer, strict=True))
        for _, tied in itertools.groupby(order, key=lambda question: question[0]):
            kinds = [has for _, has in tied]
            won += kinds.count(0) * (lower + sum(kinds) / 2)
            lower += sum(kinds)
        return 100.0 * won / lower / (len(self) - lower) if 0 < lower < len(self) else None

    def best(self) -> dict[str, float]:
        """Return the official best_exact, best_f1 and their thresholds."""
        metrics: dict[str, float] = {}
        for index, name in enumerate(("exact", "f1")):
            # The first of equal maxima: the lowest threshold, as in the official script.
            threshold, best = max(self.curve(index), key=lambda point: point[1])
            metrics |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
        return metrics


def raw_scores(golds: Golds, predictions: Mapping[str, str]) -> Scores:
    """Score every question of ``golds``, whatever its probability of having no answer.

    Raises:
        ValueError: predictions are missing, or are not strings.
    """
    _check_complete("prediction", golds, predictions, 'where there is no answer, give ""')
    for id_ in golds:
        if not isinstance(predictions[id_], str):
            raise ValueError(
                f"the prediction for question {id_} is {predictions[id_]!r}, not a string: "
                'where there is no answer, give ""'
            )
    return {id_: score_answer(predictions[id_], texts) for id_, texts in golds.items()}


def _check_complete(what: str, golds: Golds, given: Mapping[str, Any], cure: str) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"expected an object {{id: {what}}}, found {type(given).__name__}")
    missing = [id_ for id_ in golds if id_ not in given]
    if missing:
        raise ValueError(
            f"no {what} for {len(missing):,} of {len(golds):,} questions "
            f"(the first: {', '.join(missing[:3])}): {cure}"
        )


def _check_na_probs(golds: Golds, na_probs: Mapping[str, float]) -> None:
    _check_complete("na_prob", golds, na_probs, "give one for every question, or none at all")
    for id_, value in na_probs.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise ValueError(f"the na_prob of question {id_} is {value!r}, not a number")


def is_exact_match(answer: Answer, golds: Sequence[str]) -> bool:
    """Say whether a reply is strictly right: equal to a gold answer, or "?" where there is none."""
    if not golds:
        return answer.state == "no_answer"
    return answer.state == "answer" and answer.text in golds


class Outcome(NamedTuple):
    """What counts of one question for the strict columns."""

    valid: bool
    """The reply holds an answer or abstains: it is neither malformed nor failed."""
    has_answer: bool
    """There is a gold answer."""
    right: bool


def strict_outcome(answer: Answer, golds: Sequence[str]) -> Outcome:
    """Return the outcome of one question, by strict string equality."""
    valid = answer.state in ("answer", "no_answer")
    return Outcome(valid, bool(golds), is_exact_match(answer, golds))


STRICT_COLUMNS: dict[str, tuple[Callable[[Outcome], bool], Callable[[Outcome], bool]]] = {
    "% Valid JSON": (lambda o: o.valid, lambda o: True),
    "% Exact Match": (lambda o: o.right, lambda o: True),
    "% EM for Valid JSON": (lambda o: o.right, lambda o: o.valid),
    "% Correct No Answer": (lambda o: o.right, lambda o: not o.has_answer),
    "% Correct Has Answer": (lambda o: o.right, lambda o: o.has_answer),
}
"""The original's columns: which questions count as successes, and of which."""


def strict_counts(outcomes: Mapping[Outcome, int]) -> dict[str, tuple[int, int]]:
    """Return (successes, trials) of each of ``STRICT_COLUMNS``.

    Args:
        outcomes: how many questions there are of each.
    """
    counts = {}
    for name, (succeeds, counted) in STRICT_COLUMNS.items():
        tried = {outcome: n for outcome, n in outcomes.items() if counted(outcome)}
        successes = sum(n for outcome, n in tried.items() if succeeds(outcome))
        counts[name] = (successes, sum(tried.values()))
    return counts
