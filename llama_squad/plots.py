"""Plots: of no-answer probabilities, and of what adapters have learned and forgotten."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_squad.calibration import calibration_error, reliability
from llama_squad.metrics import ScoreTable


def plot_na_probs(table: ScoreTable, path: str | Path, title: str) -> None:
    """Draw what the no-answer probability is worth, in panels of one picture.

    Score against threshold (the official ``best_exact`` and ``best_f1`` are its peaks); na_prob of
    questions with and without an answer; how often there is none against na_prob, where that is a
    probability; precision against recall as in the official script; and the accuracy of the answers
    given against how many questions are given one.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(16, 8.5), layout="constrained")
    panels = figure.subplot_mosaic("THR;PC.")
    _plot_thresholds(panels["T"], table)
    _plot_histogram(panels["H"], table)
    _plot_reliability(panels["R"], table)
    _plot_precision_recall(panels["P"], table)
    _plot_coverage(panels["C"], table)
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


def _running(table: ScoreTable, index: int, answered: bool = False) -> list[tuple[int, float]]:
    """Sum the scores of predictions that are spans, the surest first.

    With ``answered`` those that abstain are passed over; else they count 0. Returns how many there
    are and their sum, at each na_prob: predictions of the same one have no order.
    """
    scores = table.f1 if index else table.exact
    order = [i for i in range(len(table)) if table.answered[i] or not answered]
    order.sort(key=table.na_prob.__getitem__)
    total, sums = 0.0, []
    for count, i in enumerate(order, 1):
        total += scores[i] if table.has_answer[i] else 0.0
        if count == len(order) or table.na_prob[order[count]] != table.na_prob[i]:
            sums.append((count, total))
    return sums


def _plot_precision_recall(panel: Any, table: ScoreTable) -> None:
    answerable = sum(table.has_answer)
    for index, name in enumerate(("exact", "F1")):
        sums = _running(table, index)
        recall = [100.0 * total / max(answerable, 1) for _, total in sums]
        precision = [100.0 * total / count for count, total in sums]
        panel.plot([0.0, *recall], [100.0, *precision], label=name)
    panel.set(xlabel="recall (%)", ylabel="precision (%)", title="Precision and recall")
    panel.set(xlim=(0, 100), ylim=(0, 105))
    _legend(panel)


def _plot_coverage(panel: Any, table: ScoreTable) -> None:
    for index, name in enumerate(("exact", "F1")):
        sums = _running(table, index, answered=True)
        coverage = [100.0 * count / len(table) for count, _ in sums]
        accuracy = [100.0 * total / count for count, total in sums]
        panel.plot(coverage, accuracy, label=name)
    panel.set(xlabel="questions given an answer (%)", ylabel="answers right (%)")
    panel.set(title="Coverage and accuracy", xlim=(0, 100), ylim=(0, 105))
    _legend(panel)


def _plot_reliability(panel: Any, table: ScoreTable) -> None:
    error = calibration_error(table)
    panel.set(xlabel="na_prob (mean of a bin)", ylabel="questions without an answer (%)")
    panel.set(title="Reliability", xlim=(0, 1), ylim=(0, 105))
    if error is None:
        panel.text(0.5, 50, "na_prob is no probability", ha="center")
        return
    counts, means, shares = zip(*reliability(table), strict=True)
    panel.plot((0, 1), (0, 100), color="grey", linewidth=0.8, label="calibrated")
    areas = [10 + 300 * count / len(table) for count in counts]
    label = f"off by {error:.1f} points on average"
    panel.plot(means, [100 * share for share in shares], linewidth=0.8)
    panel.scatter(means, [100 * share for share in shares], areas, label=label)
    _legend(panel)


def plot_forgetting(models: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draw task gained against chat kept: a point per adapter, with its standard errors.

    A panel shows exact match gained, and a second one the best spans' F1 where all are known.

    Args:
        models: name → what benchmarks/forgetting.py says of it; "base" is the origin of the gains.
        path: of the picture; its ending says the format, such as .svg.

    Raises:
        ValueError: matplotlib is not installed, or no adapter is measured.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    measured = {
        name: found
        for name, found in models.items()
        if name != "base" and "task" in found and found.get("chat", {}).get("prose_kept")
    }
    if not measured:
        raise ValueError("no adapter is measured yet: there is nothing to draw")
    gains = [
        name
        for name in FORGETTING_GAINS
        if all(name in found["task"]["paired"] for found in measured.values())
    ]
    figure = Figure(figsize=(3 + 5 * len(gains), 6), layout="constrained")
    figure.suptitle("Task gained, chat kept")
    panels = figure.subplots(1, len(gains), squeeze=False, sharey=True)[0]
    for gain, panel in zip(gains, panels, strict=True):
        _plot_gain(panel, measured, gain)
    panels[0].set_ylabel("plain prompts answered in prose (% of the base's share)")
    abstaining = models.get("base", {}).get("task", {}).get("always_abstaining")
    if abstaining is not None and "% Exact Match" in models["base"]["task"]:
        edge = abstaining - models["base"]["task"]["% Exact Match"]
        panels[0].axvline(edge, color="0.8", linestyle=":", zorder=0)
        panels[0].text(
            edge, 50, "always abstaining ", color="0.5", rotation=90, ha="right", va="center"
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


FORGETTING_GAINS = {
    "% Exact Match": "exact match on dev, gained over the base (points)",
    "HasAns_span_f1": "F1 of the best spans where there is an answer, gained (points)",
}
"""What the panels of ``plot_forgetting`` show: name of a paired figure → label of the axis."""


def _plot_gain(panel: Any, models: Mapping[str, Mapping[str, Any]], gain: str) -> None:
    """Draw one gain against the chat kept."""
    panel.axhline(100, color="0.8", zorder=0)
    panel.axvline(0, color="0.8", zorder=0)
    panel.plot(0, 100, "s", color="black")
    points, bars = {"base": (0.0, 100.0)}, []
    for index, (name, found) in enumerate(models.items()):
        gained, kept = found["task"]["paired"][gain], found["chat"]["prose_kept"]
        x, y = points[name] = gained["difference"], kept["share"]
        errors = gained["standard_error"], kept["standard_error"]
        panel.errorbar(
            x, y, xerr=errors[0], yerr=errors[1], capsize=2,
            color=f"C{index}", fmt="oD^v"[index // 10 % 4],  # there are ten colours
        )  # fmt: skip
        for part in (-1.0, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0):
            bars += [(x + part * errors[0], y), (x, y + part * errors[1])]
    panel.set_xlabel(FORGETTING_GAINS[gain])
    panel.margins(0.12)
    _label_points(panel, points, bars)


def _label_points(
    panel: Any, points: Mapping[str, tuple[float, float]], bars: Sequence[tuple[float, float]]
) -> None:
    """Write each name, the base's first, where it covers no point, no other name and no bar.

    A line leads from it to its point. Of the places around a point, the nearest free one is taken.
    """
    from matplotlib.text import Text

    figure = panel.figure
    figure.draw_without_rendering()  # which settles the layout, and so where points are
    spots = [panel.transData.transform(point) for point in (*points.values(), *bars)]
    room = panel.get_window_extent()
    taken: list[Any] = []
    around = [
        (distance * math.cos(turn * math.pi / 6), distance * math.sin(turn * math.pi / 6))
        for distance in range(14, 160, 12)
        for turn in (1, 11, 5, 7, 2, 10, 4, 8, 3, 9, 0, 6)
    ]
    for index, (name, point) in enumerate(points.items()):
        color = f"C{index - 1}" if index else "black"
        label = panel.annotate(
            name, point, fontsize=9, va="center", textcoords="offset points", xytext=(0, 0),
            color=color, arrowprops={"arrowstyle": "-", "color": color, "shrinkA": 0, "lw": 0.6},
        )  # fmt: skip
        for x, y in around:
            label.set(position=(x, y), horizontalalignment="left" if x > 0 else "right")
            label.get_window_extent()  # moves it
            box = Text.get_window_extent(label).padded(3)  # without the line to its point
            free = not any(box.overlaps(other) for other in taken)
            free = free and not any(box.contains(*spot) for spot in spots)
            if free and room.contains(*box.min) and room.contains(*box.max):
                break
        taken.append(box)
