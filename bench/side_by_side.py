"""What the benchmarks share: two or more versions of the same work, timed in turns, in one process, on one core and one thread.

Measured is the CPU time of this process, so that other programs on the machine disturb little. A ratio is that of the
medians over all rounds. It depends on the machine; a spread of five per cent from run to run is normal.
"""
import os
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
    "Return the median time of each function in µs. In a round each runs for about `seconds`, one after the other."
    timers = [Timer("f()", globals={"f": f}, timer=time.process_time) for f in functions]
    number = max(1, int(seconds / max(timers[-1].timeit(3).median, 1e-7)))
    taken = [[timer.timeit(number).median for timer in timers] for _ in range(rounds)]
    return [statistics.median(column) * 1e6 for column in zip(*taken)]


def header(work: str = "work") -> None:
    print(f"{work:60}{'ours, µs':>11}{'torch, µs':>11}{'ratio':>8}")


def row(name: str, ours: Callable[[], None], theirs: Callable[[], None], rounds: int = 31) -> float:
    "Print a row of the table and return the ratio: below 1, ours is faster."
    a, b = medians(ours, theirs, rounds=rounds)
    print(f"{name:60}{a:11.1f}{b:11.1f}{a / b:8.2f}", flush=True)
    return a / b
