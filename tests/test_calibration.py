"""na_prob that is as often right as it says."""

import math
import random

import pytest

from llama_squad.calibration import Calibration, fit_calibration, sigmoid


def drawn(scale: float, shift: float, count: int) -> tuple[list[float], list[bool]]:
    """Questions whose log-odds of no answer are scale · odds + shift."""
    rng = random.Random(3)
    odds = [rng.gauss(2, 6) for _ in range(count)]
    return odds, [rng.random() < sigmoid(scale * x + shift) for x in odds]


def test_the_fit_finds_what_questions_were_drawn_with() -> None:
    found = fit_calibration(*drawn(0.4, -1.1, 20_000))
    assert (found.scale, found.shift) == pytest.approx((0.4, -1.1), abs=0.05)
    assert found(2.75) == pytest.approx(0.5, abs=0.02)


def test_the_fit_has_the_highest_likelihood() -> None:
    """Its slopes are 0, for the targets of the source."""
    odds, without = drawn(1.5, 0.5, 300)
    found = fit_calibration(odds, without)
    count = sum(without)
    targets = [(count + 1) / (count + 2) if no else 1 / (300 - count + 2) for no in without]
    off = [found(x) - target for x, target in zip(odds, targets, strict=True)]
    assert math.fsum(off) == pytest.approx(0, abs=1e-6)
    assert math.fsum(o * x for o, x in zip(off, odds, strict=True)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_questions_that_are_told_apart_perfectly_give_no_certainty(size: float) -> None:
    found = fit_calibration([-2 * size, -size, size, 2 * size], [False, False, True, True])
    assert 0 < found.scale * size < 20
    assert found(2 * size) < 0.9 and found(-2 * size) > 0.1


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="all of one kind"):
        fit_calibration([1.0, 2.0], [True, True])
    with pytest.raises(ValueError, match="all of one kind"):
        fit_calibration([], [])
    with pytest.raises(ValueError, match="no higher where there is no answer"):
        fit_calibration([3.0, 2.0, 1.0, 0.0], [False, False, True, True])
    for odds in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="not finite"):
            fit_calibration([0.0, 1.0, odds], [False, True, True])


@pytest.mark.parametrize(
    ("scale", "shift"), [(0.0, 1.0), (-1.0, 0.0), (math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan)]
)
def test_what_is_no_calibration_is_refused(scale: float, shift: float) -> None:
    with pytest.raises(ValueError, match="no calibration"):
        Calibration(scale, shift)


def test_another_share_without_an_answer() -> None:
    """The same as fitting to questions of which that share has none."""
    odds, without = drawn(0.8, 0.0, 40_000)
    kept = [i for i, no in enumerate(without) if no or i % 4 == 0]  # a quarter of the others
    share = sum(without[i] for i in kept) / len(kept)
    wanted = fit_calibration([odds[i] for i in kept], [without[i] for i in kept])
    found = fit_calibration(odds, without).expecting(share, sum(without) / len(without))
    assert (found.scale, found.shift) == pytest.approx((wanted.scale, wanted.shift), abs=0.05)


def test_as_it_is_a_calibration_changes_nothing() -> None:
    for odds in (-800.0, -3.0, 0.0, 5.0, 800.0):
        assert Calibration()(odds) == sigmoid(odds)
    assert (sigmoid(-800), sigmoid(800)) == (0.0, 1.0)
