"""The no-answer threshold and the calibration of na_prob: tuned on the validation split.

What was tuned on all of it is kept with the adapter.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_squad.arguments import EvalArguments, ModelArguments
from llama_squad.calibration import Abstention, Calibration, calibration_error, fit_calibration
from llama_squad.config import write_json
from llama_squad.durable import one_line_errors
from llama_squad.evaluation import (
    choose_records,
    evaluate,
    resolved_settings,
    settings_of,
    validation_path,
)
from llama_squad.folders import THRESHOLD_FILE
from llama_squad.metrics import ScoreTable, score_answer
from llama_squad.predictors.base import Predictor
from llama_squad.processes import of_first, this_process
from llama_squad.result_reader import iter_results
from llama_squad.results import differences
from llama_squad.rows import log_odds, recalibrate, row_answer
from llama_squad.weights import weights_digest, whole_model

DEFAULT_THRESHOLD = Abstention().threshold

# What a tuned threshold is good for: these move na_prob, or which span it is compared with.
_TUNED_FOR = ("decoding", "num_beams", "dtype", "quantize", "bnb_4bit_quant_type", "prompt",
              "system_prompt", "reasoning_tokens", "filler", "chat_template",
              "span_boundaries")  # fmt: skip


def _tuning_settings(args: EvalArguments, model_args: ModelArguments) -> dict[str, Any]:
    """Return what a threshold depends on: how the model computes, is asked and searched."""
    settings = resolved_settings(args, model_args)
    return {
        **{name: settings[name] for name in _TUNED_FOR},
        "merged": whole_model(args.adapter_name) is not None,
        "model_digest": weights_digest(model_args.model_name),
        "adapter_digest": weights_digest(args.adapter_name),
    }


def load_abstention(args: EvalArguments, model_args: ModelArguments) -> Abstention:
    """Return the threshold (the flag's, else the adapter's tuned one, else 0.5) and calibration.

    What was tuned for other settings is not used; that is said.

    Raises:
        ValueError: the adapter's file is damaged.
    """
    given = DEFAULT_THRESHOLD if args.na_prob_thresh is None else args.na_prob_thresh
    path = Path(args.adapter_name or "", THRESHOLD_FILE)
    if not args.adapter_name or not path.is_file() or args.decoding == "free":
        return Abstention(given)
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        threshold, tuned_for = float(saved["na_prob_thresh"]), saved.get("tuned_for")
        calibration = Calibration(**saved.get("calibration", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if args.tune_threshold:  # which writes it anew
            return Abstention(given)
        raise ValueError(f"{path} is damaged ({error}): delete it, or tune again") from error
    wanted = _tuning_settings(args, model_args)
    if tuned_for == wanted:
        return Abstention(threshold if args.na_prob_thresh is None else given, calibration)
    needed = args.na_prob_thresh is None or calibration != Calibration()
    if needed and this_process().is_main_process and not args.tune_threshold:
        what = "does not say what it was tuned for"
        if isinstance(tuned_for, dict):
            what = f"was tuned for other settings ({'; '.join(differences(tuned_for, wanted))})"
        raw = " with na_prob as it is" if calibration != Calibration() else ""
        print(
            f"{path} {what}: {given} is used{raw}. --tune_threshold tunes for these "
            "settings, and --na_prob_thresh sets it by hand.",
            file=sys.stderr,
        )
    return Abstention(given)


def tune_abstention(
    model: Predictor, split: Any, args: EvalArguments, model_args: ModelArguments
) -> Abstention:
    """Choose the threshold with the best score on the validation split, and keep it.

    The score is exact match or F1 (``args.tune_for``), with ``args.calibrate`` of the calibrated
    na_prob; the questions are chosen as those of the test are, and what was tuned on a sample
    serves this run alone. ``model`` must not abstain (a threshold of 1) nor be calibrated: what it
    would have said is needed. The answers are kept in a result file of their own, so that an
    interrupted tuning is resumed.

    Raises:
        ValueError: see ``evaluate``; or na_prob cannot be calibrated.
    """
    stored = load_abstention(args, model_args)
    records = choose_records(split, args)
    assert args.batch_size is not None
    output = validation_path(Path(args.output))
    settings = settings_of(args, model_args, Abstention(1.0), records)
    settings |= {"split": "val", "n_best": 0}
    evaluate(model, records, output, settings, batch_size=args.batch_size, overwrite=args.overwrite)

    def work() -> Abstention:
        found, about = _choose(output, args, stored)
        if len(records) == len(split):
            about |= {"tuned_for": _tuning_settings(args, model_args), "settings": settings}
            _keep(found, about, Path(args.adapter_name or "", THRESHOLD_FILE))
        else:
            print(f"Tuned on a sample of {len(split):,}: for this run alone, not kept.")
        return found

    return of_first(work)


def _choose(
    output: Path, args: EvalArguments, stored: Abstention
) -> tuple[Abstention, dict[str, Any]]:
    """Choose by the answers of a file, and say so; return that, and what is kept about it.

    A stored threshold is worth keeping where it is of the same na_prob.
    """
    share = args.no_answer_share
    calibration = _calibrate(output, share) if args.calibrate else Calibration()
    table = _table(output, calibration, share)
    present = stored.threshold if stored.calibration == calibration else DEFAULT_THRESHOLD
    chosen = choose_threshold(table.curve(("exact", "f1").index(args.tune_for)), present)
    print(_describe(chosen, args.tune_for, len(table), present))
    if args.calibrate:
        before = calibration_error(_table(output, Calibration(), share))
        after = calibration_error(table)
        print(f"na_prob's calibration error there: {after:.2f} points ({before:.2f} before).")
    return Abstention(chosen.threshold, calibration), {
        "tune_for": args.tune_for,
        args.tune_for: chosen.score,
        "plateau": [chosen.low, chosen.high],
        "questions": len(table),
        **({} if share is None else {"no_answer_share": share}),
    }


def _table(output: Path, calibration: Calibration, share: float | None) -> ScoreTable:
    """Score the answers of a file, with na_prob calibrated, questions weighed to a share."""
    table = ScoreTable()
    for row in iter_results(output):
        text, golds = row_answer(row).official, row["answers"]
        na_prob = recalibrate(row, calibration)["na_prob"] or 0.0
        table.add(bool(golds), text, score_answer(text, golds), na_prob)
    if share is not None:
        try:
            table.weigh(share)
        except ValueError as error:
            raise ValueError(f"--no_answer_share cannot weigh the questions: {error}") from error
    return table


def _calibrate(output: Path, share: float | None) -> Calibration:
    """Fit a calibration to the answers of a file."""
    odds, no_answer = [], []
    for row in iter_results(output):
        if (found := log_odds(row)) is not None:
            odds.append(found)
            no_answer.append(not row["answers"])
    try:
        fitted = fit_calibration(odds, no_answer)
    except ValueError as error:
        raise ValueError(
            f"--calibrate cannot fit na_prob to the validation questions: {error}. Leave it out, "
            "or ask more of them (--num_samples)"
        ) from error
    return fitted if share is None else fitted.expecting(share, sum(no_answer) / len(no_answer))


def _keep(found: Abstention, about: dict[str, Any], path: Path) -> None:
    """Write a threshold and a calibration, where there is one, into the adapter's folder."""
    raw = found.calibration == Calibration()
    calibration = {} if raw else {"calibration": dataclasses.asdict(found.calibration)}
    with one_line_errors(path):
        write_json(path, {"na_prob_thresh": found.threshold, **calibration, **about})
    print(f"Saved in {path}")


@dataclass(frozen=True)
class Plateau:
    """The thresholds in [low, high) that give the highest score, and the one to take of them."""

    threshold: float
    score: float
    low: float
    high: float


def choose_threshold(curve: Iterable[tuple[float, float]], present: float) -> Plateau:
    """Choose the threshold with the highest score: the present one, where none is better.

    Else it is the middle of the widest range of best thresholds: what lies farthest from where
    the score falls is what new questions move least.

    Args:
        curve: of ``ScoreTable.curve``.
        present: the threshold in use, in [0, 1].
    """
    steps = dict(curve)  # predictions of one na_prob join together: the last of them counts
    best = max(steps.values())
    ranges: list[tuple[float, float]] = []
    for (low, score), high in zip(steps.items(), [*list(steps)[1:], math.inf], strict=True):
        if score < best - 1e-9:  # sums of F1 are rounded
            continue
        if ranges and ranges[-1][1] == low:
            low = ranges.pop()[0]
        ranges.append((low, high))
    for low, high in ranges:
        if low <= present < high:
            return Plateau(present, best, low, min(high, 1.0))
    ends = ((low, min(high, 1.0)) for low, high in ranges)
    low, high = max(ends, key=lambda pair: pair[1] - pair[0])
    return Plateau((low + high) / 2, best, low, high)


def _describe(chosen: Plateau, score: str, questions: int, present: float) -> str:
    kept = " (kept: none is better)" if chosen.threshold == present else ""
    return (
        f"Threshold {chosen.threshold:.4f}{kept}: {chosen.score:.2f} % {score} on {questions:,} "
        f"validation questions, as with any from {chosen.low:.4f} to {chosen.high:.4f}."
    )
