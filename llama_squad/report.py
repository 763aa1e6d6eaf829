"""The summary of result files, and of base against tuned, as text."""

import csv
import io
import itertools
import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from llama_squad.metrics import STRICT_COLUMNS

Format = Literal["table", "markdown", "csv", "json"]

Summaries = Mapping[str, Mapping[str, Any]]
"""Name of a run → what ``llama_squad.summary.summarize`` says of it."""

OFFICIAL_COLUMNS = (
    *("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact"),
    *("best_exact", "best_exact_thresh"),
)

APART_COLUMNS = ("HasAns_span_exact", "HasAns_span_f1", "na_prob_auroc", "na_prob_ece")
"""Reading: the best spans of questions with an answer, with abstention disabled; and abstaining:
how well na_prob tells the two kinds apart, and how far it is from how often there is no answer."""

_COUNTS = ("became right", "became wrong")

_NOTE = """95 % confidence intervals: Wilson's; for F1 the normal one. Questions count as
independent; those of one text or article are alike, so other texts differ more.
"""

_WIDTH = 80

_NAME_WIDTH = 12
"""The least room for a run's name, over several lines where it is longer."""


def render_summaries(summaries: Summaries, form: Format, intervals: bool = False) -> str:
    """Write one row a run: the strict columns, the official SQuAD 2.0 figures, then what is found.

    Where runs have "paired" differences to the first (``llama_squad.paired``), those stand below.
    A table is at most 80 characters wide. A csv holds all figures unrounded (best_f1 too), an
    interval as two columns, "<figure> low" and "<figure> high"; a json is a list of objects, each
    with its "name" and the "settings" that it was made with, {} where nothing tells them.

    Args:
        summaries: the runs.
        form: of the text.
        intervals: whether a table or markdown shows them; a csv and a json always do.
    """
    if form == "json":
        return _json([{"name": name, **summary} for name, summary in summaries.items()])
    if form == "csv":
        flat = [{"name": name, **_flatten(summary)} for name, summary in summaries.items()]
        columns = list(dict.fromkeys(column for row in flat for column in row))
        return _csv([columns, *([row.get(column, "") for column in columns] for row in flat)])
    told = {column for summary in summaries.values() for column in summary}
    between = "\n" if form == "table" else " "
    tables = []
    for title, columns in (
        ("strict equality", list(STRICT_COLUMNS)),
        ("official SQuAD 2.0", [column for column in OFFICIAL_COLUMNS if column in told]),
        ("spans, abstaining", [column for column in APART_COLUMNS if column in told]),
    ):
        if not columns:
            continue
        lines = [[title, "n", *columns]]
        for name, summary in summaries.items():
            cells = [_cell(summary, column, between if intervals else "") for column in columns]
            lines.append([name, f"{summary['n']:,}", *cells])
        tables.append(_terminal_table(lines) if form == "table" else _render_table(lines, form))
    tables += _paired_table(summaries, form)
    return "\n".join([*tables, *_failed_note(summaries), *[_NOTE] * intervals])


def _paired_table(summaries: Summaries, form: Format) -> list[str]:
    """Return a table of differences, and what they are; [] where none are told."""
    told = {name: summary["paired"] for name, summary in summaries.items() if "paired" in summary}
    if not told:
        return []
    (to, *_) = {paired["to"] for paired in told.values()}
    columns = list(dict.fromkeys(name for paired in told.values() for name in paired["difference"]))
    between = "\n" if form == "table" else " "
    lines = [["differences", "n", *columns, *_COUNTS]]
    for name, paired in told.items():
        cells = [_paired_cell(paired, column, between) for column in columns]
        lines.append([name, f"{paired['n']:,}", *cells, *(f"{paired[c]:,}" for c in _COUNTS)])
    table = _terminal_table(lines) if form == "table" else _render_table(lines, form)
    note = (
        f"Differences to {to} in points, on the questions that both files hold, ± half of the "
        "paired 95 % interval (questions as if independent); became right or wrong by strict "
        "equality."
    )
    return [table, textwrap.fill(note, _WIDTH, break_on_hyphens=False) + "\n"]


def _paired_cell(paired: Mapping[str, Any], column: str, between: str) -> str:
    if column not in paired["difference"]:
        return "–"
    low, high = paired["intervals"][column]
    return f"{paired['difference'][column]:+.2f}{between}± {(high - low) / 2:.2f}"


def _failed_note(summaries: Summaries) -> list[str]:
    failed = [f"{s['states']['failed']:,} of {name}" for name, s in summaries.items()
              if s["states"]["failed"]]  # fmt: skip
    if not failed:
        return []
    text = f"Questions without a reply, which count as wrong: {'; '.join(failed)}."
    return [textwrap.fill(text, _WIDTH, break_on_hyphens=False) + "\n"]


def describe_differing(questions: Mapping[str, tuple[int, str]]) -> str:
    """Say which runs do not answer the same questions, as their figures do not compare; "" if none.

    Args:
        questions: name of a run → how many questions, and a digest of them ("" where the file does
            not say, as the original's does not).
    """
    groups: dict[tuple[int, str], list[str]] = {}
    for name, key in questions.items():
        groups.setdefault(key, []).append(name)
    if len(groups) < 2:
        return ""
    held = "".join(
        f"  {n:,}{'' if digest else ' (not named in the file)'}: {'; '.join(names)}\n"
        for (n, digest), names in groups.items()
    )
    if len({n for n, _ in groups}) == 1 and len({digest for _, digest in groups if digest}) < 2:
        return f"Perhaps not the same questions, as not all files name them:\n{held}"
    return f"Not the same questions, so the rows do not compare:\n{held}"


def render_metrics(metrics: Mapping[str, float], form: Format) -> str:
    """Write the official scorer's figures: one line each, or the JSON object of the official."""
    if form == "json":
        return _json(metrics)
    if form == "csv":
        return _csv([list(metrics), list(metrics.values())])
    lines = [[name, str(value)] for name, value in metrics.items()]
    return _render_table([["figure", "value"], *lines], form)


def render_comparison(
    base: Mapping[str, Mapping[str, Any]],
    tuned: Mapping[str, Mapping[str, Any]],
    paired: Mapping[tuple[str, str], float] | None = None,
) -> str:
    """Write the figures of two lm-evaluation-harness runs side by side, as a markdown table.

    Args:
        base: the "results" of its JSON file: task → {"metric,filter": value,
            "metric_stderr,filter": standard error}, as shares in [0, 1] for most metrics.
        tuned: the same of the tuned model, on the same tasks.
        paired: (task, "metric,filter") → standard error of the difference over the same questions.

    Without a paired standard error, the one of two independent samples stands there, with a mark:
    both models answer the same questions, so the true one is smaller. A difference beyond two
    standard errors is marked.
    """
    lines = [["task", "metric", "base", "tuned", "difference", "± s.e.", "beyond 2 s.e."]]
    for task, key, before, after in shared_metrics(base, tuned):
        metric, _, kind = key.partition(",")
        errors = [_number(run[task].get(f"{metric}_stderr,{kind}")) for run in (base, tuned)]
        name = metric if kind == "none" else f"{metric} ({kind})"
        error = (paired or {}).get((task, key))
        lines.append([task, name, *_difference(before, after, errors, error)])
    note = "\n\\* of two independent samples: the true one is smaller\n"
    return _render_table(lines, "markdown") + note * any("*" in line[-2] for line in lines)


def shared_metrics(
    base: Mapping[str, Mapping[str, Any]], tuned: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, str, float, float]]:
    """Yield task, "metric,filter" and both values of what two runs of the harness have in common.

    Args:
        base: as for ``render_comparison``.
        tuned: the same of the tuned model.
    """
    for task, metrics in base.items():
        for key in metrics:
            metric, _, kind = key.partition(",")
            before, after = (_number(run.get(task, {}).get(key)) for run in (base, tuned))
            if kind and not metric.endswith("_stderr") and before is not None and after is not None:
                yield task, key, before, after


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def _difference(
    before: float, after: float, errors: Sequence[float | None], paired: float | None
) -> list[str]:
    cells = [f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"]
    known = [error for error in errors if error is not None]
    if paired is None and len(known) < len(errors):
        return [*cells, "–", ""]
    error = math.hypot(*known) if paired is None else paired
    beyond = abs(after - before) > 2 * error
    mark = " *" if paired is None else ""
    return [
        *cells,
        f"{error:.4f}{mark}",
        ("lower" if after < before else "higher") if beyond else "",
    ]


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _csv(records: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(records)
    return text.getvalue()


def _flatten(summary: Mapping[str, Any]) -> dict[str, Any]:
    apart = ("states", "intervals", "paired", "settings")
    flat = {key: value for key, value in summary.items() if key not in apart}
    for name, (low, high) in summary["intervals"].items():
        flat |= {f"{name} low": low, f"{name} high": high}
    flat |= summary["states"]
    if paired := summary.get("paired"):
        flat |= {f"paired {key}": paired[key] for key in ("to", "n", *_COUNTS)}
        for name, (low, high) in paired["intervals"].items():
            gain = f"{name} difference"
            flat |= {gain: paired["difference"][name], f"{gain} low": low, f"{gain} high": high}
    return flat


def _cell(summary: Mapping[str, Any], column: str, between: str = "") -> str:
    """Return a figure, and after ``between``, if that is not "", its interval."""
    value = summary.get(column)
    if value is None:
        return "–"
    if column.endswith("_thresh"):
        return f"{value:.4f}"
    if column not in summary["intervals"] or not between:
        return f"{value:.2f}"
    low, high = summary["intervals"][column]
    interval = f"{low:.1f}–{high:.1f}" if between == "\n" else f"[{low:.1f}–{high:.1f}]"
    return f"{value:.2f}{between}{interval}"


def _terminal_table(lines: Sequence[Sequence[str]]) -> str:
    """Align a table in at most 80 columns: headers wrap, names wrap, and columns go on below."""
    header, *rows = lines
    wrapped = [[header[0], *map(_wrap_header, header[1:])], *rows]
    widths = [
        max(len(part) for line in wrapped for part in line[index].split("\n"))
        for index in range(len(header))
    ]
    room = _WIDTH - sum(width + 2 for width in widths[1:])
    widths[0] = min(widths[0], max(_NAME_WIDTH, room))
    blocks: list[list[int]] = [[]]
    for index in range(1, len(header)):
        if widths[0] + sum(widths[i] + 2 for i in [*blocks[-1], index]) > _WIDTH:
            blocks.append([])
        blocks[-1].append(index)
    return "\n".join(_block(wrapped, [0, *block], widths) for block in blocks)


def _wrap_header(title: str) -> str:
    """Break a column's title at spaces and behind underscores, into lines of about ten letters."""
    parts = textwrap.wrap(title.replace("_", "_ "), 10, break_long_words=False)
    return "\n".join(part.replace("_ ", "_") for part in parts)


def _wrap_name(name: str, width: int) -> list[str]:
    return textwrap.wrap(name, width, break_on_hyphens=False)


def _block(lines: Sequence[Sequence[str]], columns: Sequence[int], widths: Sequence[int]) -> str:
    text = []
    for number, line in enumerate(lines):
        cells = [
            (_wrap_name(line[i], widths[i]) if i == 0 else line[i].split("\n")) for i in columns
        ]
        height = max(map(len, cells))
        if number == 0:  # titles stand on the rule
            cells = [[""] * (height - len(cell)) + cell for cell in cells]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            pairs = zip(parts, (widths[i] for i in columns), strict=True)
            shown = [p.rjust(w) if i else p.ljust(w) for i, (p, w) in enumerate(pairs)]
            text.append("  ".join(shown).rstrip())
        if number == 0:
            text.append("  ".join("─" * widths[i] for i in columns))
    return "\n".join(text) + "\n"


def _render_table(cells: Sequence[Sequence[str]], form: Format) -> str:
    """Align columns, the first to the left and figures to the right."""
    if form == "markdown":
        cells = [[text.replace("|", "\\|") for text in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        [
            text.rjust(width) if index else text.ljust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in cells
    ]
    if form == "markdown":
        dashes = ["-" * max(width - 1, 1) for width in widths]  # a rule of ":" alone is none
        rule = [dash + (":" if index else "-") for index, dash in enumerate(dashes)]
        return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])
    rule = ["─" * width for width in widths]
    return "".join("  ".join(line).rstrip() + "\n" for line in [lines[0], rule, *lines[1:]])
