"""Forward and backward of the layers of fromfound.normalize against torch.nn: time, as a ratio (below 1: ours is faster).

    python bench/bench_normalize.py            # all rows
    python bench/bench_normalize.py --quick    # fewer rounds

Both sides do the same work on the same input, in turns, in one process, on one thread and one core; gradients of input and
parameters are dropped after each turn. In a program that works on larger tensors too, freed memory stays with the process.
A block that's freed at the beginning brings glibc into that state, for both sides; otherwise what's measured is how often the
kernel has to hand out fresh pages, which changes from run to run by a factor of two. "--cold" leaves it out.
"""
import sys

import torch
from side_by_side import medians, one_core
from torch import nn

from fromfound import normalize


def steps(ours, theirs, shape):
    "Return forward and backward of our layer and of torch's."
    x, g = torch.randn(shape), torch.randn(shape)
    xt = x.clone().requires_grad_()
    ours_params, their_params = list(ours.parameters()), list(theirs.parameters())

    def our_step():
        ours(x).g = g
        ours.backward()
        for t in (x, *ours_params): t.g = None

    def their_step():
        theirs(xt).backward(g)
        for t in (xt, *their_params): t.grad = None

    return our_step, their_step


ROWS = [("BatchNorm2d", (16,), (64, 16, 14, 14)), ("BatchNorm1d", (100,), (64, 100)), ("LayerNorm", (128,), (16, 128, 128)),
        ("Dropout", (0.5,), (64, 1000))]

if __name__ == "__main__":
    one_core()
    torch.manual_seed(0)
    if "--cold" not in sys.argv:
        block = torch.zeros(7_000_000)  # 27 MiB; glibc learns from blocks of up to 32
        del block
    print(f"{'work':40}{'ours, µs':>11}{'torch, µs':>11}{'ratio':>8}")
    for name, args, shape in ROWS:
        a, b = medians(*steps(getattr(normalize, name)(*args), getattr(nn, name)(*args), shape), rounds=9 if "--quick" in sys.argv else 31)
        print(f"{name + ' ' + '×'.join(map(str, shape)):40}{a:11.0f}{b:11.0f}{a / b:8.2f}", flush=True)
