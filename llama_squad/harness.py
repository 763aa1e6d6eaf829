"""The lm-evaluation-harness: run it, read its files, and pair the answers of two of its runs.

Runs ``python -m lm_eval`` of the Python that this runs in; loads no model and no torch itself.
"""

import json
import math
import os
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_squad.intervals import standard_error
from llama_squad.report import shared_metrics

Question = tuple[str, str, str]
"""Task, number of the question in it, digest of the question."""
Values = dict[Question, tuple[float, float]]
"""Question → what a metric gives it, and its weight (1, or a number of words or bytes)."""


class Run(NamedTuple):
    """What the harness found for one model."""

    results: dict[str, dict[str, Any]]
    """Task or group → {"metric,filter": figure, ...}."""
    groups: dict[str, list[str]]
    """Group → its tasks or groups."""
    values: dict[tuple[str, str], Values]
    """(task, "metric,filter") → values of the questions."""


# Running it ----------------------------------------------------------------------------------


def run_harness(arguments: Sequence[str], log: Path) -> None:
    """Run lm_eval: its output goes to ``log`` and, up to a traceback, to standard error.

    Raises:
        ValueError: it fails; the message is its own last line.
    """
    show, last, rest = True, b"", b""
    with (
        log.open("wb") as file,
        subprocess.Popen(
            [sys.executable, "-m", "lm_eval", "run", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        while chunk := process.stdout.read1(65536):  # type: ignore[attr-defined]
            file.write(chunk)
            *pieces, rest = re.split(rb"(?<=[\r\n])", rest + chunk)
            for piece in pieces:
                show = show and not piece.startswith(b"Traceback (most recent call last)")
                last = piece if piece.strip() else last
                if show:
                    sys.stderr.buffer.write(piece)
                    sys.stderr.buffer.flush()
    if process.returncode:
        line = (rest if rest.strip() else last).decode(errors="replace").strip()
        raise ValueError(f"lm_eval failed: {line or process.returncode}{_cure(line)}. See {log}")


def stay_offline() -> None:
    """Tell the Hub's library, here and in the harness, where the Hub does not answer.

    It then takes what is here already, instead of trying again for a minute. The library reads this
    when it is imported: call it before.
    """
    if os.environ.get("HF_HUB_OFFLINE"):
        return
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5)
    except (OSError, ValueError) as error:
        # an error of HTTP is an answer, and the library has certificates of its own
        refused = isinstance(getattr(error, "reason", None), ssl.SSLError)
        if not (refused or isinstance(error, urllib.error.HTTPError)):
            os.environ["HF_HUB_OFFLINE"] = "1"


def _cure(line: str) -> str:
    if re.search(r"[Oo]ffline|[Cc]onnect|couldn't reach|huggingface\.co|HTTP|resolve", line):
        return ": it is not here, and the Hub is not reached; check your network, or give a folder"
    return ""


# Its files -----------------------------------------------------------------------------------


def load_run(folder: Path) -> Run:
    """Read what the harness wrote under ``--output_path``, with ``--log_samples``."""
    (path,) = folder.rglob("results_*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    values: dict[tuple[str, str], Values] = {}
    for path in sorted(folder.rglob("samples_*.jsonl")):
        task = re.sub(r"^samples_(.*)_\d{4}-\d\d-\d\dT[\d.-]+$", r"\1", path.stem)
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                sample = json.loads(line)
                question = (task, str(sample["doc_id"]), str(sample.get("doc_hash")))
                for metric in sample.get("metrics", ()):
                    if value := _value(sample.get(metric)):
                        key = (task, f"{metric},{sample.get('filter', 'none')}")
                        values.setdefault(key, {})[question] = value
    return Run(content["results"], content.get("group_subtasks", {}), values)


def _value(logged: Any) -> tuple[float, float] | None:
    match logged:
        case int() | float():
            return float(logged), 1.0
        case [int() | float() as total, int() | float() as weight]:
            return float(total), float(weight)
    return None


def compare(
    base: Run, tuned: Run, errors: Mapping[tuple[str, str], float]
) -> dict[str, dict[str, Any]]:
    """Return task → metric → both sides' figures, their difference and its paired standard error.

    ``errors`` are those of ``paired_errors``; None stands for one that is missing.
    """
    found: dict[str, dict[str, Any]] = {}
    for task, key, before, after in shared_metrics(base.results, tuned.results):
        found.setdefault(task, {})[key.removesuffix(",none")] = {
            "base": before,
            "tuned": after,
            "difference": after - before,
            "standard_error": errors.get((task, key)),
        }
    return found


# Pairing -------------------------------------------------------------------------------------

_FORMS: tuple[tuple[Callable[[float], float], Callable[[float], float]], ...] = (
    (lambda mean: mean, lambda mean: 1.0),
    (lambda mean: _exp(-mean), lambda mean: -_exp(-mean)),
    (lambda mean: -mean / math.log(2), lambda mean: -1 / math.log(2)),
)
"""What the harness makes of the (weighted) mean over the questions: accuracies and the like,
perplexities, bits per byte; each with its derivative."""


def paired_errors(base: Run, tuned: Run) -> dict[tuple[str, str], float]:
    """Return (task, "metric,filter") → standard error of tuned - base over the same questions.

    For a mean over the questions it is the standard deviation of their differences over the root
    of their number; for a function of a weighted mean, such as a perplexity, the same by the delta
    method. A group of tasks has one where its figure is the mean over all its questions. Other
    figures (F1 over classes, a corpus BLEU) have none.
    """
    errors = {}
    for task, metrics in base.results.items():
        leaves = _leaves(task, base.groups)
        for key in metrics:
            before, after = (
                {q: v for leaf in leaves for q, v in run.values.get((leaf, key), {}).items()}
                for run in (base, tuned)
            )
            if len(before) < 2 or before.keys() != after.keys():
                continue
            reported = metrics[key], tuned.results.get(task, {}).get(key)
            changes = _changes(reported, (before, after))
            if changes:
                errors[task, key] = standard_error(changes)
    return errors


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # more overflows


def _leaves(task: str, groups: Mapping[str, Sequence[str]]) -> set[str]:
    parts = groups.get(task)
    return {leaf for part in parts for leaf in _leaves(part, groups)} if parts else {task}


def _changes(reported: Sequence[Any], sides: Sequence[Values]) -> list[float]:
    """Return what each question adds to the difference of two figures, up to a constant.

    [] where the figures are no known function of the questions' values.
    """
    totals = [[sum(column) for column in zip(*side.values(), strict=True)] for side in sides]
    if not all(weight for _, weight in totals):
        return []
    means = [value / weight for value, weight in totals]
    for form, slope in _FORMS:
        if all(map(_is_near, reported, map(form, means))):
            before, after = (
                _influences(side, mean, slope(mean) * len(side) / weight)
                for side, mean, (_, weight) in zip(sides, means, totals, strict=True)
            )
            return [after[question] - before[question] for question in before]
    return []


def _influences(side: Values, mean: float, scale: float) -> dict[Question, float]:
    return {q: scale * (value - mean * weight) for q, (value, weight) in side.items()}


def _is_near(figure: Any, value: float) -> bool:
    return isinstance(figure, int | float) and math.isclose(
        figure, value, rel_tol=1e-6, abs_tol=1e-9
    )
