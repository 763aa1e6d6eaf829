"""This process among others: those that torchrun or accelerate started, and other work's.

Uses nothing of ours.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import get_int_from_env, parse_flag_from_env


def this_process() -> PartialState:
    """Return this process's rank; the first call meets the other processes.

    Trainers have met them before, in their own way. In an evaluation no tensor passes between the
    processes, so gloo does on GPUs, too, and they may wait for one another for days.
    """
    if get_int_from_env(["WORLD_SIZE"], 1) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    # on the CPU, as it is the group's place: which GPU is ours, ``modeling.device`` says
    return PartialState(cpu=True)


def is_sharded() -> bool:
    """Tell whether a training spreads each weight over its processes, by FSDP."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def share(value: Any) -> Any:
    """Return the first process's value to all, once all are here."""
    if this_process().num_processes == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    dist.barrier()  # not accelerate's, which names GPUs that gloo does not take
    return box[0]


_T = TypeVar("_T")


def of_first(work: Callable[[], _T]) -> _T:
    """Let the first process alone do some work, and return to all what comes of it.

    Raises:
        ValueError: the work raised it; on all processes alike, so that none waits for another.
    """
    value, error = None, ""
    if this_process().is_main_process:
        try:
            value = work()
        except ValueError as fault:
            error = str(fault)
    value, error = share((value, error))
    if error:
        raise ValueError(error)
    return value


# Cores ---------------------------------------------------------------------------------------

THREADS_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""A user who sets one of them has chosen the number of threads; torchrun sets the first."""

IDLE_WINDOW_S = 1.0
"""So long the cores are watched."""


def take_free_cores() -> int:
    """Let torch compute on no more threads than cores are idle now, and return how many it has.

    The threads of a product wait for the slowest one, so that a second thread on a core that
    another run keeps busy makes both runs slower than one thread would. Runs that start within the
    same second do not see each other. Nothing changes where the user has set the number, or where
    the system does not tell (it is not Linux).
    """
    threads = torch.get_num_threads()
    if threads == 1 or any(os.environ.get(name) for name in THREADS_VARIABLES):
        return threads
    before = core_times()
    if not before:
        return threads
    time.sleep(IDLE_WINDOW_S)
    after = core_times()
    shares = [
        (after[core][0] - before[core][0]) / ticks
        for core in before.keys() & after.keys()
        if (ticks := after[core][1] - before[core][1]) > 0
    ]
    if not shares:  # a sandbox's /proc/stat may stand still (gVisor)
        return threads
    idle = sum(shares)
    torch.set_num_threads(max(1, min(threads, round(idle))))
    return torch.get_num_threads()


def core_times() -> dict[int, tuple[int, int]]:
    """Return the ticks that each core of ours has been idle, and all its ticks; {} if untold."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        mine = os.sched_getaffinity(0)
    except (OSError, AttributeError):
        return {}
    times = {}
    for line in lines:
        name, *ticks = line.split()
        core = name.removeprefix("cpu")
        if name.startswith("cpu") and core.isdigit() and int(core) in mine:
            counts = [int(tick) for tick in ticks[:8]]  # user … steal; guests are in user
            times[int(core)] = (counts[3] + counts[4], sum(counts))  # idle, or waiting for a disk
    return times
