"""The figures of a result file, in bounded memory; the files of the official scorer."""

import hashlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_squad.calibration import calibration_error
from llama_squad.config import write_json
from llama_squad.durable import one_line_errors
from llama_squad.intervals import Interval, mean_interval, wilson_interval
from llama_squad.metrics import (
    Outcome,
    ScoreTable,
    score_answer,
    strict_counts,
    strict_outcome,
)
from llama_squad.rows import STATES, Row, best_answer, row_answer


def write_official(rows: Iterable[Row], directory: str | Path) -> None:
    """Write the official scorer's predictions.json and, where all rows have one, na_prob.json.

    No answer is "" there; a malformed reply is ``MALFORMED_PREDICTION``, which scores as wrong.

    Raises:
        ValueError: a file cannot be written.
    """
    directory = Path(directory)
    predictions, na_probs = official_predictions(rows)
    with one_line_errors(directory):
        write_json(directory / "predictions.json", predictions)
        if na_probs is None:  # none may stay there from another run
            (directory / "na_prob.json").unlink(missing_ok=True)
        else:
            write_json(directory / "na_prob.json", na_probs)


def official_predictions(
    rows: Iterable[Row],
) -> tuple[dict[str, str], dict[str, float] | None]:
    """Return {id: official text} and, where every row has one, {id: na_prob}, else None."""
    predictions: dict[str, str] = {}
    na_probs: dict[str, float] = {}
    for row in rows:
        predictions[row["id"]] = row_answer(row).official
        if row["na_prob"] is not None:
            na_probs[row["id"]] = row["na_prob"]
        elif row["state"] == "failed":  # an answer that is wrong at every threshold
            na_probs[row["id"]] = 0.0
    return predictions, na_probs if len(na_probs) == len(predictions) else None


class Tally:
    """What is kept of the rows of one file for its figures: some bytes of each row.

    The predictions are those of the file, where a threshold has been applied already. Beside them
    the rows' best spans are scored, so that best_exact and best_f1 are the same whatever the
    threshold was. A failed question, which has no na_prob, is wrong at every threshold: it counts
    as one of na_prob 0, in the AUROC and the calibration error, too.
    """

    def __init__(self) -> None:
        self._outcomes, self._states = Counter[Outcome](), Counter[str]()
        self._given, self._best = ScoreTable(), ScoreTable()
        self._tells = self._weighs = True

    def add(self, row: Row) -> None:
        """Count a row in."""
        golds, answer, best = row["answers"], row_answer(row), best_answer(row)
        na_prob = 0.0 if answer.state == "failed" else row["na_prob"]
        self._states[answer.state] += 1
        self._outcomes[strict_outcome(answer, golds)] += 1
        score = score_answer(answer.official, golds)
        self._given.add(bool(golds), answer.official, score, na_prob)
        self._weighs = self._weighs and na_prob is not None
        self._tells = self._tells and self._weighs and best is not None
        if self._tells and best is not None:
            best_score = score if best == answer else score_answer(best.official, golds)
            self._best.add(bool(golds), best.official, best_score, na_prob)

    def weighed(self) -> ScoreTable | None:
        """Return what can be compared with a threshold; None where a row has no na_prob.

        Those are the best spans, or in older files, which do not tell them, the predictions.
        """
        return None if not self._weighs else self._best if self._tells else self._given

    def metrics(self) -> dict[str, Any]:
        """Return the figures of ``summarize``."""
        metrics: dict[str, Any] = {}
        intervals: dict[str, Interval] = {}
        for name, (successes, trials) in strict_counts(self._outcomes).items():
            metrics[name] = 100.0 * successes / trials if trials else None
            if trials:
                intervals[name] = wilson_interval(successes, trials)
        intervals |= _official_intervals(self._given)
        return {
            "n": len(self._given),
            "states": {state: self._states[state] for state in STATES},
            **metrics,
            **self._given.averages(),
            **(self._best.best() if self._tells else {}),
            **self._apart(),
            "intervals": {name: list(ends) for name, ends in intervals.items()},
        }

    def _apart(self) -> dict[str, float]:
        """Tell reading from abstaining: what spans are found, and whom na_prob sorts out."""
        found: dict[str, float] = {}
        if self._tells:  # of the default threshold, 1, no span falls short
            averages = self._best.averages()
            names = ("exact", "f1") if "HasAns_exact" in averages else ()
            found = {f"HasAns_span_{name}": averages[f"HasAns_{name}"] for name in names}
        weighed = self.weighed()
        auroc = None if weighed is None else weighed.auroc()
        error = None if weighed is None else calibration_error(weighed)
        told = {"na_prob_auroc": auroc, "na_prob_ece": error}
        return found | {name: value for name, value in told.items() if value is not None}


def summarize(rows: Iterable[Row]) -> dict[str, Any]:
    """Compute the figures of one result file, in per cent; the rows are passed over once.

    Returns:
        "n"; "states" (count of each); ``STRICT_COLUMNS`` (None where no question counts for one);
        the official figures of ``evaluate_predictions`` over the rows' own gold answers, best_*
        only where all rows tell their best span (``best_answer``) and have a na_prob; so too
        "HasAns_span_exact" and "HasAns_span_f1", the scores of the best spans where there is an
        answer, with abstention disabled, "na_prob_auroc" (``ScoreTable.auroc``) and "na_prob_ece"
        (``llama_squad.calibration``); and
        "intervals": figure → [low, high] at 95 %, Wilson's for proportions and the normal one for
        F1 (see ``llama_squad.intervals``).
    """
    tally = Tally()
    for row in rows:
        tally.add(row)
    return tally.metrics()


def _official_intervals(table: ScoreTable) -> dict[str, Interval]:
    intervals: dict[str, Interval] = {}
    for prefix, wanted in (("", (0, 1)), ("HasAns_", (1,)), ("NoAns_", (0,))):
        chosen = bytearray(has in wanted for has in table.has_answer)
        if any(chosen):
            exact = sum(itertools.compress(table.exact, chosen))
            f1 = array("d", itertools.compress(table.f1, chosen))
            intervals[f"{prefix}exact"] = wilson_interval(exact, sum(chosen))
            intervals[f"{prefix}f1"] = mean_interval(f1)
    return intervals


def question_digest(row: Row) -> int:
    """Return what tells questions apart, by their id, their words and their right answers."""
    text = json.dumps([row["id"], row["question"], row["answers"]])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())


class Questions:
    """Which questions a file answers, in any order: their number, and a digest."""

    def __init__(self) -> None:
        self._count = self._digest = 0
        self._named = False

    def add(self, row: Row) -> None:
        """Count a row's question and its right answers in."""
        self._digest ^= question_digest(row)
        self._named = self._named or bool(row["question"])
        self._count += 1

    def key(self) -> tuple[int, str]:
        """Return the number and the digest: "" where the file does not name the questions.

        The original's files number their rows, and name none.
        """
        return self._count, f"{self._digest:032x}" if self._named else ""
