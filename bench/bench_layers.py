"""Training steps of fromfound.layers against torch.nn: time and peak memory, as ratios (below 1: ours is faster, or smaller).

    python bench/bench_layers.py            # all rows
    python bench/bench_layers.py --quick    # fewer rounds, without the widest net

Both sides do the same work from the same weights, in turns, in one process, on one thread and one core. A step is forward,
cross-entropy, backward, and an update by SGD with momentum: torch.optim.SGD with its defaults there, the same arithmetic in
place here. Measured is the CPU time of this process, so that other programs on the machine disturb little; the ratio is that
of the medians over all rounds. "inference_mode" is our step inside torch.inference_mode(); torch's step is the same in both
columns. For peak memory each side runs in a process of its own: how far its resident memory rises above its level before
the step. Ratios depend on the machine; a spread of five per cent from run to run is normal.
"""
import os
import subprocess
import sys

if "--memory" in sys.argv and os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:  # give freed blocks back at once: peaks are exact
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})

import torch
from side_by_side import medians, one_core
from torch import nn

from fromfound import layers

LR, MOMENTUM = 1e-3, 0.9


def nets(sizes):
    "Return the same multilayer perceptron twice, ours and torch's, with equal weights."
    ours, theirs = [], []
    for n_in, n_out in zip(sizes, sizes[1:]):
        ours += [layers.Linear(n_in, n_out), layers.ReLU()]
        theirs += [nn.Linear(n_in, n_out), nn.ReLU()]
    ours, theirs = layers.Sequential(*ours[:-1]), nn.Sequential(*theirs[:-1])
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def steps(sizes, batch):
    "Return our training step and torch's."
    x, y = torch.randn(batch, sizes[0]), torch.randint(0, sizes[-1], (batch,))
    ours, theirs = nets(sizes)
    model, loss_func = layers.Model(ours, layers.CrossEntropyLoss()), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=LR, momentum=MOMENTUM)
    pairs = [(p, torch.zeros_like(p)) for p in model.parameters()]

    def our_step():
        model(x, y)
        model.backward()
        for p, v in pairs:
            torch.add(p.g, v, alpha=MOMENTUM, out=v)
            p.add_(v, alpha=-LR)
            p.g = None

    def their_step():
        optimizer.zero_grad()
        loss_func(theirs(x), y).backward()
        optimizer.step()

    return our_step, their_step


def cross_entropies(n, classes):
    "Return forward and backward of the loss alone, ours and torch's."
    x, y = torch.randn(n, classes), torch.randint(0, classes, (n,))
    xt, ours, theirs = x.clone().requires_grad_(), layers.CrossEntropyLoss(), nn.CrossEntropyLoss()

    def our_step():
        ours(x, y)
        ours.backward()
        x.g = None

    def their_step():
        theirs(xt, y).backward()
        xt.grad = None

    return our_step, their_step


def inside_inference_mode(step):
    def run():
        with torch.inference_mode(): step()
    return run


def time_table(rounds, widest):
    torch.manual_seed(0)
    print(f"{'work':40}{'ours, µs':>11}{'torch, µs':>11}{'ratio':>8}{'inference_mode':>16}")
    wide = (784, 512, 512, 10)
    rows = [((784, 50, 10), 64), ((2, 100, 3), 300), (wide, 64), (wide, 512)] + [(wide, 4096)] * widest
    for sizes, batch in rows:
        ours, theirs = steps(sizes, batch)
        a, b, c = medians(ours, inside_inference_mode(ours), theirs, rounds=rounds)
        print(f"{'step ' + '-'.join(map(str, sizes)) + f', batch {batch}':40}{a:11.0f}{c:11.0f}{a / c:8.2f}{b / c:16.2f}", flush=True)
    a, c = medians(*cross_entropies(2048, 65), rounds=rounds)
    print(f"{'cross-entropy 2048×65':40}{a:11.0f}{c:11.0f}{a / c:8.2f}", flush=True)


def resident(key):
    "Return VmRSS (now) or VmHWM (highest so far) of this process in MiB."
    with open("/proc/self/status") as f: return next(int(line.split()[1]) for line in f if line.startswith(key)) / 1024


def memory_of(side, depth=20, width=1024, batch=1024):
    "Return how far a step of forward and backward lifts the resident memory, in MiB."
    x, target = torch.randn(batch, width), torch.randn(batch, width)
    ours, theirs = nets([width] * (depth + 1))
    model, loss_func = layers.Model(ours, layers.MSELoss()), nn.MSELoss()
    if side == "ours": del theirs
    small = torch.randn(8, 8) @ torch.randn(8, 8)  # wakes up the matrix library
    before = resident("VmRSS")
    if side == "ours":
        model(x, target)
        model.backward()
    else:
        loss_func(theirs(x), target).backward()
    return resident("VmHWM") - before


def memory_table():
    ours, theirs = (float(subprocess.run([sys.executable, __file__, "--memory", side], check=True, capture_output=True, text=True).stdout)
                    for side in ("ours", "torch"))
    print(f"{'peak memory, 20 layers of 1024':40}{ours:7.1f} MiB{theirs:7.1f} MiB{ours / theirs:8.2f}")


if __name__ == "__main__":
    one_core()
    if "--memory" in sys.argv:
        print(memory_of(sys.argv[-1]))
    else:
        quick = "--quick" in sys.argv
        time_table(rounds=9 if quick else 31, widest=not quick)
        if os.path.exists("/proc/self/status"): memory_table()
