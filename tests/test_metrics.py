"""The official figures and the strict columns.

Against the official scorer's own output, where it is, and against figures that stand here, worked
out by a second reading of the definition (``by_definition``) that shares no line with ours.
"""

import dataclasses
import json
import math
import random
import re
import statistics
import string
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_squad.answers import Answer
from llama_squad.calibration import calibration_error, reliability
from llama_squad.intervals import mean_interval, standard_error, wilson_interval
from llama_squad.metrics import (
    ScoreTable,
    evaluate_predictions,
    gold_texts,
    is_exact_match,
    normalize_answer,
    score_answer,
    strict_counts,
    strict_outcome,
)
from llama_squad.thresholds import Plateau, choose_threshold

RECIPES = {
    "synthetic_all_empty": lambda golds: "",
    "synthetic_first_gold": lambda golds: golds[0] if golds else "",
    "synthetic_last_gold": lambda golds: golds[-1] if golds else "",
    "synthetic_first_gold_upper_punct": lambda golds: f"The {golds[0].upper()} !" if golds else "",
}


def answerable(dev: dict[str, Any]) -> dict[str, Any]:
    paragraphs = [p for article in dev["data"] for p in article["paragraphs"]]
    kept = [{"qas": [q for q in p["qas"] if not q["is_impossible"]]} for p in paragraphs]
    return {"data": [{"paragraphs": kept}]}


def test_golden_vectors(shared_data: Path) -> None:
    """Published systems' answers to all of dev, and the official scorer's output for them."""
    squad = shared_data / "squad_v2"
    dev = json.loads((squad / "dev.json").read_text())
    vectors = json.loads((squad / "expected_scores.json").read_text())["vectors"]
    assert len(vectors) == 10
    for name, vector in vectors.items():
        if vector["file"]:
            predictions = json.loads((squad / "predictions" / vector["file"]).read_text())
        else:
            recipe = RECIPES[name]
            predictions = {id_: recipe(golds) for id_, golds in gold_texts(dev).items()}
        references = answerable(dev) if "restricted" in vector["evaluated_on"] else dev
        na_probs = None
        if "na_prob_file" in vector:
            na_probs = json.loads((squad / "predictions" / vector["na_prob_file"]).read_text())
        threshold = vector.get("na_prob_thresh", 1.0)
        figures = evaluate_predictions(references, predictions, na_probs, threshold)
        assert figures.keys() == vector["scores"].keys(), name
        assert figures == pytest.approx(vector["scores"], rel=0, abs=1e-9), name


# Id → gold answers, prediction, na_prob. In the order of the probabilities, but for one tie.
HAND_MADE: dict[str, tuple[list[str], str, float]] = {
    "right": (["Ada Lovelace"], "Ada Lovelace", 0.05),
    "normalised": (["the R&B girl-group"], "RB  Girlgroup!", 0.1),
    "half": (["in the late 1990s"], "late 1990s", 0.15),  # 2 words of 2, of 3: F1 0.8
    "best of two": (["x y z w", "y z"], "y z w", 0.2),  # 3 of 3, of 4: 6/7; 2 of 3, of 2: 0.8
    "twice": (["b a1 a1"], "b b a1", 0.2),  # 2 of 3, of 3
    "caught": ([], "", 0.25),
    "fooled": ([], "Ada", 0.3),
    "article": ([], "the", 0.35),  # nothing is left of it: right, but for the curve it is not
    "missed": (["Ada"], "", 0.4),
    "unsure": (["1815"], "1815", 0.5),
    "only an article": (["the"], "", 0.6),  # a gold answer of which nothing is left
    "other script": (["中文 é"], "中文 e", 0.7),
    "late": ([], "Ada", 0.9),
}


def by_definition(
    cases: dict[str, tuple[list[str], str, float]], threshold: float, with_na_probs: bool = True
) -> dict[str, float]:
    """Score as Rajpurkar, Jia and Liang (2018) and their script say it, one question at a time."""

    def words(text: str) -> list[str]:
        kept = "".join(char for char in text.lower() if char not in string.punctuation)
        return [word for word in re.split(r"\b(?:a|an|the)\b|\s+", kept) if word]

    def score(golds: list[str], prediction: str) -> tuple[float, float]:
        best = (0.0, 0.0)
        given = words(prediction)
        for gold in [g for g in map(words, golds) if g] or [[]]:
            left, common = list(gold), 0
            for word in given:
                if word in left:
                    left.remove(word)
                    common += 1
            f1 = 2 * common / (len(given) + len(gold)) if given and gold else float(given == gold)
            best = max(best[0], float(given == gold)), max(best[1], f1)
        return best

    raw = {id_: score(golds, text) for id_, (golds, text, _) in cases.items()}
    kinds = {"": list(cases), "HasAns_": [i for i in cases if cases[i][0]],
             "NoAns_": [i for i in cases if not cases[i][0]]}  # fmt: skip
    abstained = {i: (float(not cases[i][0]),) * 2 for i in cases}
    figures: dict[str, float] = {}
    for prefix, ids in kinds.items():
        for index, name in enumerate(("exact", "f1")):
            held = [(abstained if with_na_probs and cases[i][2] > threshold else raw)[i][index]
                    for i in ids]  # fmt: skip
            figures |= {f"{prefix}{name}": 100 * sum(held) / len(ids)} if ids else {}
        figures |= {f"{prefix}total": len(ids)} if ids else {}
    if with_na_probs:
        # Accept the surest answers one by one. Any words there, where there is no answer, are wrong.
        surest = sorted(cases, key=lambda id_: cases[id_][2])
        curve = {id_: raw[id_] if golds or not text else (0.0, 0.0)
                 for id_, (golds, text, _) in cases.items()}  # fmt: skip
        for index, name in enumerate(("exact", "f1")):
            best = -1.0
            for count in range(len(surest) + 1):
                accepted = set(surest[:count])
                total = sum((curve if i in accepted else abstained)[i][index] for i in cases)
                if total > best + 1e-12:
                    best = total
                    thresh = cases[surest[count - 1]][2] if count else 0.0
            figures |= {f"best_{name}": 100 * best / len(cases), f"best_{name}_thresh": thresh}
    return figures


BEST = {
    "best_exact": 46.153846,
    "best_exact_thresh": 0.1,
    "best_f1": 67.875458,
    "best_f1_thresh": 0.7,
}
TOTALS = {"total": 13, "HasAns_total": 9, "NoAns_total": 4}
NAMES = ["exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1"]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (1.0, [46.153846, 67.875458, 44.444444, 75.820106, 50.0, 50.0]),
        (0.5, [46.153846, 64.029304, 33.333333, 59.153439, 75.0, 75.0]),
        (0.2, [46.153846, 64.029304, 22.222222, 48.042328, 100.0, 100.0]),
    ],
)
def test_hand_made_vectors(threshold: float, expected: list[float]) -> None:
    literal = dict(zip(NAMES, expected, strict=True)) | TOTALS | BEST
    references = squad_form(**{id_: case[0] for id_, case in HAND_MADE.items()})
    predictions = {id_: text for id_, (_, text, _) in HAND_MADE.items()}
    na_probs = {id_: na_prob for id_, (_, _, na_prob) in HAND_MADE.items()}
    assert by_definition(HAND_MADE, threshold) == pytest.approx(literal, abs=1e-6)
    figures = evaluate_predictions(references, predictions, na_probs, threshold)
    assert figures == pytest.approx(literal, abs=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_random_vectors(seed: int) -> None:
    """Bags of few words, in which every kind of overlap, tie and empty answer comes up."""
    chance = random.Random(seed)

    def text(shortest: int) -> str:
        words = chance.choices(
            ["the", "A", "b", "c.", "C", "d", "-", "é"], k=chance.randint(shortest, 4)
        )
        return " ".join(words)

    cases = {
        f"q{number}": (
            [text(1) for _ in range(chance.randint(0, 3))], text(0), chance.randint(0, 10) / 10
        )
        for number in range(chance.randint(1, 12))
    }  # fmt: skip
    references = squad_form(**{id_: golds for id_, (golds, _, _) in cases.items()})
    predictions = {id_: answer for id_, (_, answer, _) in cases.items()}
    na_probs = {id_: na_prob for id_, (_, _, na_prob) in cases.items()}
    threshold = chance.choice([0.0, 0.3, 0.5, 1.0])
    found = evaluate_predictions(references, predictions, na_probs, threshold)
    assert found == pytest.approx(by_definition(cases, threshold), abs=1e-9)
    without = evaluate_predictions(references, predictions)
    assert without == pytest.approx(by_definition(cases, 1.0, with_na_probs=False), abs=1e-9)


def squad_form(**golds: list[Any]) -> list[dict[str, Any]]:
    qas = [{"id": i, "answers": [{"text": t} for t in texts]} for i, texts in golds.items()]
    return [{"paragraphs": [{"qas": qas}]}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, a dog & an Owl!", "cat dog owl"),
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("l'été—1990", "lété—1990"),  # only ASCII punctuation goes
        ("A", ""),
        ("\u00a0x\u3000y ", "x y"),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("late 1990s", ["in the late 1990s"], (0, 0.8)),  # P = 1, R = 2/3
        ("late 1990s", ["1990s", "in the late 1990s"], (0, 0.8)),
        ("b b a1", ["b a1 a1"], (0, 2 / 3)),  # bags of words: b and a1 once each
        ("x", ["y"], (0, 0.0)),
        ("", ["y"], (0, 0.0)),
        ("", [], (1, 1.0)),
        ("the", [], (1, 1.0)),  # nothing is left of it, as in the official script
        ("y", [], (0, 0.0)),
        ("", ["the"], (1, 1.0)),  # a gold answer of which nothing is left
        ("The Y!", ["y"], (1, 1.0)),
    ],
)
def test_score_answer(prediction: str, golds: list[str], expected: tuple[int, float]) -> None:
    assert score_answer(prediction, golds) == pytest.approx(expected)


def test_threshold_abstains_above_not_at() -> None:
    references = squad_form(a=["x"], b=[])
    predictions = {"a": "x", "b": "y"}
    figures = evaluate_predictions(references, predictions, {"a": 0.5, "b": 0.6}, 0.5)
    assert (figures["exact"], figures["HasAns_exact"], figures["NoAns_exact"]) == (100, 100, 100)
    figures = evaluate_predictions(references, predictions, {"a": 0.5, "b": 0.6}, 0.49)
    assert (figures["HasAns_exact"], figures["NoAns_exact"]) == (0, 100)


def test_best_threshold_is_the_first_of_equals_and_joins_ties_one_by_one() -> None:
    references = squad_form(a=["x"], b=["x"], c=[], d=[])
    predictions = {"a": "x", "b": "x", "c": "y", "d": ""}
    # 50 % at 0.0, a: 75 %, c: 50 %, b: 75 %: not better than a's.
    figures = evaluate_predictions(references, predictions, {"a": 0.1, "c": 0.2, "b": 0.3, "d": 1})
    assert (figures["best_exact"], figures["best_exact_thresh"]) == (75.0, 0.1)
    # Of one probability, the order of the file decides: the peak may lie inside of the tie.
    figures = evaluate_predictions(references, predictions, dict.fromkeys("abcd", 0.4))
    assert (figures["best_exact"], figures["best_f1_thresh"]) == (100.0, 0.4)
    figures = evaluate_predictions(references, predictions, dict.fromkeys("cabd", 0.4))
    assert figures["best_exact"] == 75.0
    # A question that is abstained on already neither gains nor loses.
    figures = evaluate_predictions(references, predictions, {"d": 0.1, "a": 0.2, "b": 0.3, "c": 1})
    assert (figures["best_exact"], figures["best_exact_thresh"]) == (100.0, 0.3)
    # Nothing beats abstaining: the threshold stays at zero.
    figures = evaluate_predictions(
        references, dict.fromkeys("abcd", "z"), dict.fromkeys("abcd", 0.4)
    )
    assert (figures["best_exact"], figures["best_exact_thresh"]) == (50.0, 0.0)


def test_auroc_counts_pairs_and_ties_by_half() -> None:
    rng = random.Random(5)
    table = ScoreTable()
    assert table.auroc() is None
    for _ in range(80):
        na_prob = rng.choice([0.0, 0.2, 0.2, 0.5, 0.9, 1.0])
        table.add(rng.random() < 0.6, "x", (1, 1.0), na_prob)
    questions = list(zip(table.has_answer, table.na_prob, strict=True))
    without = [p for has, p in questions if not has]
    pairs = [(p > q) + (p == q) / 2 for p in without for has, q in questions if has]
    assert table.auroc() == pytest.approx(100 * statistics.mean(pairs))


def test_weighed_questions_count_as_if_they_were_more() -> None:
    """The curve and the calibration error are those of a table that holds them so many times."""
    rng = random.Random(7)
    table, repeated = ScoreTable(), ScoreTable()
    for number in range(90):
        has, score = number % 3 > 0, rng.choice([(0, 0.0), (0, 0.4), (1, 1.0)])
        question = (has, rng.choice(["x", ""]), score if has else (0, 0.0), rng.random())
        table.add(*question)
        for _ in range(1 if has else 4):  # 60 and 30 become 60 and 120
            repeated.add(*question)
    table.weigh(2 / 3)
    for index in (0, 1):
        assert dict(table.curve(index)) == pytest.approx(dict(repeated.curve(index)))
    assert calibration_error(table) == pytest.approx(calibration_error(repeated))
    with pytest.raises(ValueError, match="all of one kind"):
        ScoreTable().weigh(0.5)


def test_calibration_error() -> None:
    """By a second way: numpy's histogram over bins of equal width."""
    rng = random.Random(6)
    table = ScoreTable()
    for _ in range(500):
        na_prob = rng.choice([0.0, 1.0, rng.random(), rng.random()])
        table.add(rng.random() < 1 - na_prob**2, "x", (1, 1.0), na_prob)
    edges = np.linspace(0, 1, 16)
    without = 1 - np.array(table.has_answer)
    mean, share = (
        np.histogram(table.na_prob, edges, weights=weights)[0]
        for weights in (table.na_prob, without)
    )
    assert calibration_error(table) == pytest.approx(100 * np.abs(mean - share).sum() / 500)
    assert sum(count for count, _, _ in reliability(table)) == 500
    table.add(True, "x", (1, 1.0), 3.5)  # log-odds of some other system
    assert calibration_error(table) is None


def test_keys_of_one_kind_of_question_and_strangers() -> None:
    figures = evaluate_predictions({"data": squad_form(a=["x"])}, {"a": "x", "stranger": "z"})
    assert figures == {
        "exact": 100.0, "f1": 100.0, "total": 1,
        "HasAns_exact": 100.0, "HasAns_f1": 100.0, "HasAns_total": 1,
    }  # fmt: skip
    with_na = evaluate_predictions(squad_form(a=["x"]), {"a": "x"}, {"a": 0.1, "stranger": 0.0})
    assert (with_na["best_exact"], with_na["best_exact_thresh"]) == (100.0, 0.1)


@pytest.mark.parametrize(
    ("references", "predictions", "na_probs", "message"),
    [
        (squad_form(a=["x"], b=[]), {"a": "x"}, None, "no prediction for 1 of 2 questions .*b"),
        (squad_form(a=["x"]), {"a": None}, None, "question a is None, not a string"),
        (squad_form(a=["x"]), {"a": 3}, None, "question a is 3, not a string"),
        (squad_form(a=["x"]), ["x"], None, "found list"),
        (squad_form(a=["x"]), {"a": "x"}, {}, "no na_prob for 1 of 1"),
        (squad_form(a=["x"]), {"a": "x"}, {"a": "0.1"}, "na_prob of question a is '0.1'"),
        (squad_form(a=["x"]), {"a": "x"}, {"a": float("nan")}, "na_prob of question a is nan"),
        ([], {}, None, "hold no question"),
        ({"dataset": []}, {}, None, "not in the official SQuAD form"),
        ([{"paragraphs": [{"qas": [{"id": "a"}]}]}], {}, None, "KeyError: 'answers'"),
        (squad_form(a=["x", None]), {"a": "x"}, None, "the text of an answer is no string"),
        ("dev.json", {}, None, "not in the official SQuAD form"),
        (None, {}, None, "not in the official SQuAD form"),
    ],
)
def test_errors_name_what_is_wrong(
    references: Any, predictions: Any, na_probs: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_predictions(references, predictions, na_probs)


def test_strict_match() -> None:
    abstained, malformed = Answer("no_answer", "?"), Answer("malformed", "")
    assert is_exact_match(Answer("answer", "x"), ["w", "x"])
    assert not is_exact_match(Answer("answer", "X"), ["x"])
    assert not is_exact_match(Answer("answer", "x"), [])
    assert is_exact_match(abstained, [])
    assert not is_exact_match(abstained, ["?"])
    assert not is_exact_match(malformed, [])
    assert not is_exact_match(malformed, [""])


def test_strict_columns() -> None:
    right, abstained, malformed = (
        Answer("answer", "x"),
        Answer("no_answer", "?"),
        Answer("malformed", ""),
    )
    answers = [right, right, abstained, abstained, abstained, malformed, malformed, right]
    golds: list[list[str]] = [["x"], ["y"], [], [], ["x"], [], ["x"], []]
    outcomes = Counter(map(strict_outcome, answers, golds))
    assert strict_counts(outcomes) == {
        "% Valid JSON": (6, 8),
        "% Exact Match": (3, 8),
        "% EM for Valid JSON": (3, 6),
        "% Correct No Answer": (2, 4),
        "% Correct Has Answer": (1, 4),
    }


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [
        # scipy.stats.binomtest(k, n).proportion_ci(method="wilson"), scipy 1.17
        (8, 10, (49.01624715, 94.33178485)),
        (0, 10, (0.0, 27.75327998)),
        (10, 10, (72.24672002, 100.0)),
    ],
)
def test_wilson(successes: int, trials: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(successes, trials) == pytest.approx(expected, abs=1e-6)


def test_mean_interval() -> None:
    # mean 0.5, s = 0.5 sqrt(4/3), n = 4: half-width 1.959964 · 0.288675 = 0.565793, cut to [0, 1]
    assert mean_interval([0.0, 0.0, 1.0, 1.0]) == (0.0, 100.0)
    assert standard_error([0.4, 0.6] * 50) == pytest.approx(0.1 * math.sqrt(1 / 99))
    low, high = mean_interval([0.4, 0.6] * 50)
    # s = 0.1 sqrt(100/99), n = 100: half-width 1.959964 · 0.01005038 = 0.01969838
    assert (low, high) == pytest.approx((48.030162, 51.969838), abs=1e-6)
    assert mean_interval([0.3]) == (0.0, 100.0)
    assert mean_interval([0.0] * 5 + [1.0] * 5) != wilson_interval(5, 10)
    assert mean_interval([1.0] * 10) == wilson_interval(10, 10)
    assert mean_interval([0.0] * 10) == wilson_interval(0, 10)
    with pytest.raises(ValueError, match="nothing"):
        mean_interval([])


def curve_of(*questions: tuple[float, bool, float]) -> list[tuple[float, float]]:
    """Return the curve of questions: na_prob, whether there is an answer, F1 of what is given."""
    table = ScoreTable()
    for na_prob, has_answer, f1 in questions:
        table.add(has_answer, "x", (int(f1 == 1), f1), na_prob)
    return list(table.curve(1))


def test_a_threshold_is_the_middle_of_its_plateau() -> None:
    right, wrong = (0.0065, True, 1.0), (0.9, False, 0.0)
    assert choose_threshold(curve_of(right, wrong), 0.0) == Plateau(0.45325, 100.0, 0.0065, 0.9)
    # The present one where none is better, at both ends of the plateau.
    for present in (0.0065, 0.5, 0.8999):
        assert choose_threshold(curve_of(right, wrong), present).threshold == present
    assert choose_threshold(curve_of(right, wrong), 0.9).threshold == 0.45325
    # Up to 1 where nothing comes after; a score of 0.0 from 0.3 on leaves the plateau whole.
    chosen = choose_threshold(curve_of((0.2, True, 1.0), (0.3, True, 0.0)), 0.0)
    assert dataclasses.astuple(chosen) == (pytest.approx(0.6), 50.0, 0.2, 1.0)
    assert choose_threshold(curve_of((0.2, True, 1.0)), 1.0).threshold == 1.0
    # At 1.0 itself a wrong answer would be given.
    assert choose_threshold(curve_of((0.2, True, 1.0), (1.0, False, 0.0)), 1.0).threshold == 0.6


def test_a_threshold_is_in_the_widest_of_several_plateaus() -> None:
    curve = curve_of((0.1, True, 1.0), (0.2, False, 0.0), (0.4, True, 1.0), (0.8, False, 0.0))
    assert [score for _, score in curve] == [50.0, 75.0, 50.0, 75.0, 50.0]
    assert choose_threshold(curve, 0.9).threshold == pytest.approx(0.6)
    assert choose_threshold(curve, 0.15).threshold == 0.15


def test_questions_of_one_probability_are_told_apart_by_no_threshold() -> None:
    """Between them the curve rises, as in the official script, but no threshold can stand there."""
    curve = curve_of((0.3, True, 1.0), (0.3, False, 0.0))
    assert max(score for _, score in curve) == 100.0
    assert choose_threshold(curve, 0.5) == Plateau(0.5, 50.0, 0.0, 1.0)


def test_a_threshold_for_exact_or_for_f1() -> None:
    table = ScoreTable()
    table.add(True, "x", (1, 1.0), 0.1)
    table.add(False, "x", (0, 0.0), 0.4)
    table.add(True, "x y", (0, 0.9), 0.5)
    table.add(True, "x y", (0, 0.9), 0.6)
    assert choose_threshold(table.curve(0), 0.0).threshold == pytest.approx(0.25)
    assert choose_threshold(table.curve(1), 0.0).threshold == pytest.approx(0.8)
