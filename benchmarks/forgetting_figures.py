"""Figures of one adapter against its base, for forgetting.py, and what it was trained with."""

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))
from llama_squad.chat_check import ChatReply, summarize_chat
from llama_squad.config import load_run_config
from llama_squad.harness import Run, paired_errors
from llama_squad.intervals import standard_error
from llama_squad.metrics import score_answer
from llama_squad.rows import Row, best_answer, row_answer
from llama_squad.summary import summarize

Figures = dict[str, Any]


def paired(before: Sequence[float], after: Sequence[float]) -> Figures:
    """Return the mean difference of paired figures, with its standard error."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return {
        "difference": statistics.fmean(differences),
        "standard_error": standard_error(differences) if len(differences) > 1 else 0.0,
    }


def compare_rows(base: Sequence[Row], tuned: Sequence[Row]) -> Figures:
    """Return the figures of the task in %, and their differences to the base.

    ``always_abstaining`` is what its exact match would be without any answer. Where all rows tell
    their best spans, those are compared as well, over the questions that have an answer.
    """
    rows = [{row["id"]: row for row in side} for side in (base, tuned)]
    if rows[0].keys() != rows[1].keys():
        raise ValueError("base and adapter have not answered the same questions")
    wanted = ("% Valid JSON", "% Exact Match", "exact", "f1", "HasAns_f1", "NoAns_f1",
              "% Correct No Answer", "HasAns_span_f1", "na_prob_auroc")  # fmt: skip
    summary = summarize(tuned)
    scores = [
        [_scores(side[id_]) for id_ in rows[0]] for side in rows
    ]  # of each side and question: strict, exact, F1
    columns = [zip(*side, strict=True) for side in scores]
    names = ("% Exact Match", "exact", "f1")
    differences = {n: paired(b, t) for n, b, t in zip(names, *columns, strict=True)}
    answerable = [id_ for id_, row in rows[0].items() if row["answers"]]
    spans = [_span_f1([side[id_] for id_ in answerable]) for side in rows]
    if all(spans):
        differences["HasAns_span_f1"] = paired(*spans)
    return {
        "questions": len(tuned),
        "always_abstaining": 100.0 * (1 - len(answerable) / len(tuned)),
        **{name: summary[name] for name in wanted if name in summary},
        "paired": differences,
    }


def _scores(row: Row) -> tuple[float, float, float]:
    exact, f1 = score_answer(row_answer(row).official, row["answers"])
    return 100.0 * row["Exact match"], 100.0 * exact, 100.0 * f1


def _span_f1(rows: Sequence[Row]) -> list[float]:
    """Return the F1 of what each row would say if it must not abstain; [] if one does not tell."""
    told = [(best_answer(row), row["answers"]) for row in rows if row["na_prob"] is not None]
    scores = [100.0 * score_answer(best.official, golds)[1] for best, golds in told if best]
    return scores if len(scores) == len(rows) else []


def compare_chat(base: Sequence[ChatReply], tuned: Sequence[ChatReply]) -> Figures:
    """Return the figures of the replies, the share of the base's prose that is kept, differences.

    ``prose_kept`` is in % of the base's share, its standard error by the delta method;
    None where the base gives no prose.
    """
    prose = [[100.0 * (reply.kind == "prose") for reply in side] for side in (base, tuned)]
    means = [statistics.fmean(side) for side in prose]
    kept = None
    if means[0]:
        share = means[1] / means[0]
        error = paired([share * value for value in prose[0]], prose[1])["standard_error"] / means[0]
        kept = {"share": 100.0 * share, "standard_error": 100.0 * error}
    both = [
        (math.log(b.perplexity), math.log(t.perplexity))
        for b, t in zip(base, tuned, strict=True)
        if b.perplexity and t.perplexity
    ]
    return {
        **summarize_chat(tuned),
        "prose_kept": kept,
        "paired": {
            "prose": paired(*prose),
            **{
                name: paired(*([getattr(reply, name) for reply in side] for side in (base, tuned)))
                for name in ("words", "repetition")
            },
            **({"log_perplexity": paired(*zip(*both, strict=True))} if both else {}),
        },
    }


def compare_windows(base: Sequence[float], tuned: Sequence[float], tokens: int) -> Figures:
    """Return the perplexity of a text, and its difference to the base's.

    Args:
        base: log-probabilities of its windows, in nats.
        tuned: the same of the adapter.
        tokens: that are predicted in each window.
    """
    runs = []
    for side in (base, tuned):
        values = {("t", str(n), ""): (value, float(tokens)) for n, value in enumerate(side)}
        perplexity = math.exp(-sum(side) / (tokens * len(side)))
        runs.append(Run({"t": {"p,": perplexity}}, {}, {("t", "p,"): values}))
    before, after = (run.results["t"]["p,"] for run in runs)
    return {
        "perplexity": after,
        "paired": {
            "difference": after - before,
            "standard_error": paired_errors(*runs).get(("t", "p,"), 0.0),
        },
    }


def trained_with(adapter: str) -> Figures:
    """Return the settings that tell the study's trainings apart; {} where they are not known."""
    saved = load_run_config(adapter)
    known = {**saved.get("trainer", {}), **saved.get("train", {})}
    whole = known.get("full_parameters")
    names = ("learning_rate", "max_steps", "per_device_train_batch_size",
             *(("full_parameters",) if whole else ("lora_r", "alora_from")),
             "loss_on", "chat_share", "chat_kl")  # fmt: skip
    return {name: known[name] for name in names if name in known}
