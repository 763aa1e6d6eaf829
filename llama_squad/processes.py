"""This process among those that torchrun or accelerate started; alone without them."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import get_int_from_env


def this_process() -> PartialState:
    """Return this process's rank; the first call meets the other processes.

    Trainers have met them before, in their own way. In an evaluation no tensor passes between the
    processes, so gloo does on GPUs, too, and they may wait for one another for days.
    """
    if get_int_from_env(["WORLD_SIZE"], 1) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    # on the CPU, as it is the group's place: which GPU is ours, ``modeling.device`` says
    return PartialState(cpu=True)


def share(value: Any) -> Any:
    """Return the first process's value to all, once all are here."""
    if this_process().num_processes == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    dist.barrier()  # not accelerate's, which names GPUs that gloo does not take
    return box[0]
