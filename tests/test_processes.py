"""Threads: no more than cores are free, unless the user has said how many."""

import time
from collections.abc import Iterator

import pytest
import torch

from llama_squad import modeling, processes


@pytest.fixture(autouse=True)
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four threads, none of them asked for, and no wait."""
    for name in processes.THREADS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "IDLE_WINDOW_S", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def watch(monkeypatch: pytest.MonkeyPatch, *idle: float) -> None:
    """Let the system tell that the cores were idle for such shares of the time."""
    start = {core: (1000, 5000) for core in range(len(idle))}
    end = {core: (1000 + int(100 * share), 5100) for core, share in enumerate(idle)}
    times = iter([start, end])
    monkeypatch.setattr(processes, "core_times", lambda: next(times))


@pytest.mark.parametrize(
    ("idle", "threads"),
    [
        ((1, 1, 1, 1), 4),
        ((0.9, 1, 0.95, 0.9), 4),
        ((0, 1, 1, 1), 3),
        ((0.5, 0.5, 0.6, 0.5), 2),
        ((0, 0, 0.1, 0), 1),
        ((0, 0, 0, 0), 1),
        ((1,) * 8, 4),  # no more than torch would take
    ],
)
def test_threads_are_the_cores_that_are_idle(
    idle: tuple[float, ...], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch, *idle)
    assert processes.take_free_cores() == threads == torch.get_num_threads()


@pytest.mark.parametrize("name", processes.THREADS_VARIABLES)
def test_a_number_that_was_asked_for_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch(monkeypatch, 0, 0, 0, 0)
    monkeypatch.setenv(name, "4")
    assert processes.take_free_cores() == 4


def test_nothing_changes_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    # no file, and one that stands still, as in some sandboxes
    for told in ({}, {core: (0, 0) for core in range(4)}):
        monkeypatch.setattr(processes, "core_times", lambda told=told: told)
        assert processes.take_free_cores() == 4


def test_what_this_system_tells() -> None:
    before = processes.core_times()
    if not before:
        pytest.skip("this system does not tell how busy its cores are")
    time.sleep(0.1)
    for core, (idle, total) in processes.core_times().items():
        assert idle <= total
        assert idle >= before[core][0]
        assert total > before[core][1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of CPUs")
def test_says_how_many_and_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watch(monkeypatch, 0, 0, 1, 0)
    modeling.choose_device()
    watch(monkeypatch, 1)  # one thread by now
    modeling.choose_device()
    assert capsys.readouterr().err.splitlines() == [
        "No CUDA device: running on the CPU, 1 thread, as other work keeps the rest of 4 cores busy.",
        "No CUDA device: running on the CPU, 1 thread.",
    ]
