"""Steps of fromfound.optim against torch.optim, as ratios of time (below 1: ours is faster).

    python bench/bench_optim.py            # all rows
    python bench/bench_optim.py --quick    # fewer rounds

All sides make the same step on tensors of the same sizes with the same gradients; how they are timed is said in
side_by_side.py. "ratio" is against torch.optim with its defaults, "fused" against its compiled `fused=True`, which RMSprop
doesn't have. Twenty small tensors are a network of ten narrow layers with biases, four are the digits' 64-50-10.
"""
import sys

import torch
from side_by_side import medians, one_core

from fromfound import optim

OPTIMISERS = [
    ("SGD", {}), ("SGD", dict(momentum=0.9)), ("SGD", dict(momentum=0.9, nesterov=True, weight_decay=1e-4)),
    ("RMSprop", {}), ("RMSprop", dict(momentum=0.9, centered=True)), ("Adam", {}), ("Adam", dict(amsgrad=True)), ("AdamW", {}),
]
SIZES = {
    "20 tensors, 25,500 numbers": [(50, 50), (50,)] * 10,
    "4 tensors, 3,760 numbers": [(50, 64), (50,), (10, 50), (10,)],
    "2 tensors, 1,049,600 numbers": [(1024, 1024), (1024,)],
}


def steps(name, options, shapes):
    "Return our step, torch's and torch's fused one, on equal parameters and gradients; the first step is done."
    torch.manual_seed(0)
    start, grads = [torch.randn(shape) for shape in shapes], [torch.randn(shape) for shape in shapes]
    kinds = [(optim, {}), (torch.optim, {}), *([(torch.optim, dict(fused=True))] if name != "RMSprop" else [])]
    found = []
    for module, more in kinds:
        params = [torch.nn.Parameter(p.clone()) for p in start]
        for p, g in zip(params, grads): p.g, p.grad = g.clone(), g.clone()
        optimizer = getattr(module, name)(params, **options, **more)
        optimizer.step()
        for p, q in zip(params, found[0].params if found else params): torch.testing.assert_close(p, q)
        optimizer.params = params
        found.append(optimizer)
    return [optimizer.step for optimizer in found]


def clips(shapes):
    "Return our clipping by norm and torch's."
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params: p.g, p.grad = torch.randn_like(p), torch.randn_like(p)
    return lambda: optim.clip_grad_norm_(params, 1.0), lambda: torch.nn.utils.clip_grad_norm_(params, 1.0)


def row(name, functions, rounds):
    ours, theirs, *fused = medians(*functions, rounds=rounds)
    last = f"{ours / fused[0]:8.2f}" if fused else ""
    print(f"{name:60}{ours:11.1f}{theirs:11.1f}{ours / theirs:8.2f}{last}", flush=True)


if __name__ == "__main__":
    one_core()
    rounds = 9 if "--quick" in sys.argv else 31
    for what, shapes in SIZES.items():
        print(f"{what:60}{'ours, µs':>11}{'torch, µs':>11}{'ratio':>8}{'fused':>8}")
        for name, options in OPTIMISERS:
            row(f"{name}({', '.join(f'{k}={v}' for k, v in options.items())})", steps(name, options, shapes), rounds)
        row("clip_grad_norm_", clips(shapes), rounds)
        print()
