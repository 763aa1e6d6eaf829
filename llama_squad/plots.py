"""Plots of no-answer probabilities: thresholds, histogram, precision and recall, coverage."""

import math
from pathlib import Path
from typing import Any

from llama_squad.metrics import ScoreTable


def plot_na_probs(table: ScoreTable, path: str | Path, title: str) -> None:
    """Draw what the no-answer probability is worth, in four panels of one picture.

    Score against threshold (the official ``best_exact`` and ``best_f1`` are its peaks); precision
    against recall as in the official script; na_prob of questions with and without an answer; and
    the accuracy of the answers given against how many questions are given one.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    panels = figure.subplots(2, 2)
    _plot_thresholds(panels[0, 0], table)
    _plot_histogram(panels[0, 1], table)
    _plot_precision_recall(panels[1, 0], table)
    _plot_coverage(panels[1, 1], table)
    figure.suptitle(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


_SURE = 1e-6
"""Probabilities nearer to 0 or 1 are drawn as this near: log-odds have no place for 0 and 1."""

_TICKS = {
    _SURE: "0", 1e-4: ".0001", 0.01: ".01", 0.1: ".1", 0.5: ".5",
    0.9: ".9", 0.99: ".99", 0.9999: ".9999", 1 - _SURE: "1",
}  # fmt: skip


def _set_log_odds(panel: Any) -> None:
    """Let the x axis be na_prob in log-odds: a trained model's are nearly all close to 0 or 1."""
    panel.set_xscale("logit")
    panel.set_xticks(list(_TICKS), list(_TICKS.values()))
    panel.set_xticks([], minor=True)
    panel.set_xlim(_SURE / 2, 1 - _SURE / 2)


def _within(probability: float) -> float:
    return min(max(probability, _SURE), 1 - _SURE)


def _legend(panel: Any) -> None:
    """Put the legend under the panel, where it covers nothing."""
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def _plot_thresholds(panel: Any, table: ScoreTable) -> None:
    for index, name in enumerate(("exact", "F1")):
        curve = list(table.curve(index))
        threshold, best = max(curve, key=lambda point: point[1])
        thresholds = [_within(threshold) for threshold, _ in curve]
        values = [value for _, value in curve]
        (line,) = panel.plot(thresholds, values, drawstyle="steps-post", label=name)
        label = f"best {name} {best:.2f} at {threshold:.3g}"
        panel.plot(_within(threshold), best, "o", color=line.get_color(), label=label)
    panel.set(
        xlabel="na_prob above which to abstain (axis in log-odds)",
        ylabel="score (%)",
        title="Threshold",
    )
    _set_log_odds(panel)
    _legend(panel)


def _plot_histogram(panel: Any, table: ScoreTable) -> None:
    most = math.log((1 - _SURE) / _SURE)
    edges = [1 / (1 + math.exp(-most * index / 20)) for index in range(-20, 21)]
    edges[0], edges[-1] = _SURE / 1.0001, 1 - _SURE / 1.0001  # rounding must leave none outside
    for name, has_answer in (("HasAns", True), ("NoAns", False)):
        pairs = zip(table.has_answer, table.na_prob, strict=True)
        values = [_within(na_prob) for has, na_prob in pairs if bool(has) == has_answer]
        panel.hist(values, bins=edges, alpha=0.6, label=f"{name} ({len(values):,})")
    panel.set(
        xlabel="na_prob (axis in log-odds)",
        ylabel="questions",
        title="Questions with and without an answer",
    )
    _set_log_odds(panel)
    _legend(panel)


def _running(table: ScoreTable, index: int, answered: bool = False) -> list[float]:
    """Sum the scores of predictions that are spans, the surest first.

    With ``answered`` those that abstain are passed over; else they count 0.
    """
    scores = table.f1 if index else table.exact
    total, sums = 0.0, []
    for i in sorted(range(len(table)), key=table.na_prob.__getitem__):
        if answered and not table.answered[i]:
            continue
        total += scores[i] if table.has_answer[i] else 0.0
        sums.append(total)
    return sums


def _plot_precision_recall(panel: Any, table: ScoreTable) -> None:
    answerable = sum(table.has_answer)
    for index, name in enumerate(("exact", "F1")):
        sums = _running(table, index)
        recall = [100.0 * total / max(answerable, 1) for total in sums]
        precision = [100.0 * total / count for count, total in enumerate(sums, 1)]
        panel.plot(recall, precision, label=name)
    panel.set(xlabel="recall (%)", ylabel="precision (%)", title="Precision and recall")
    panel.set(xlim=(0, 100), ylim=(0, 105))
    _legend(panel)


def _plot_coverage(panel: Any, table: ScoreTable) -> None:
    for index, name in enumerate(("exact", "F1")):
        sums = _running(table, index, answered=True)
        coverage = [100.0 * count / len(table) for count in range(1, len(sums) + 1)]
        accuracy = [100.0 * total / count for count, total in enumerate(sums, 1)]
        panel.plot(coverage, accuracy, label=name)
    panel.set(xlabel="questions given an answer (%)", ylabel="answers right (%)")
    panel.set(title="Coverage and accuracy", xlim=(0, 100), ylim=(0, 105))
    _legend(panel)
