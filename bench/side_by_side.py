"""What the benchmarks share: versions of the same work, timed in turns of random order, in one process, on one core and one thread.

Measured is the CPU time of this process, so that other programs on the machine disturb little. A ratio is that of the
medians over all rounds. It depends on the machine; a spread of five per cent from run to run is normal.
"""
import os
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer


def one_core() -> None:
    "Keep this process on one core and PyTorch in one thread."
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"): os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def medians(*functions: Callable[[], None], rounds: int = 31, seconds: float = 0.02) -> list[float]:
    "Return the median time of each function in µs. In a round each runs for about `seconds`, in random order."
    timers = [Timer("f()", globals={"f": f}, timer=time.process_time) for f in functions]
    number = max(1, int(seconds / max(timers[-1].timeit(3).median, 1e-7)))
    taken = [[] for _ in timers]
    for _ in range(rounds):
        for i in random.sample(range(len(timers)), len(timers)): taken[i].append(timers[i].timeit(number).median * 1e6)
    return [statistics.median(times) for times in taken]
