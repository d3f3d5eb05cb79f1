"""Steps of fromfound.optim against torch.optim with its defaults, as ratios of time (below 1: ours is faster).

    python bench/bench_optim.py            # all rows
    python bench/bench_optim.py --quick    # fewer rounds

Both sides make the same step on tensors of the same sizes with the same gradients; how they are timed is said in
side_by_side.py. Twenty small tensors are a network of ten narrow layers with biases, four are the digits' 64-50-10.
"""
import sys

import torch
from side_by_side import header, one_core, row

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
    "Return our step and torch's, on equal parameters and gradients; the first step, which makes the state, is done."
    torch.manual_seed(0)
    ours = [torch.randn(shape) for shape in shapes]
    theirs = [torch.nn.Parameter(p.clone()) for p in ours]
    for p, q in zip(ours, theirs):
        p.g = torch.randn_like(p)
        q.grad = p.g.clone()
    pair = getattr(optim, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)
    for optimizer in pair: optimizer.step()
    for p, q in zip(ours, theirs): torch.testing.assert_close(p, q.detach())
    return [optimizer.step for optimizer in pair]


def clips(shapes):
    "Return our clipping by norm and torch's."
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params: p.g, p.grad = torch.randn_like(p), torch.randn_like(p)
    return lambda: optim.clip_grad_norm_(params, 1.0), lambda: torch.nn.utils.clip_grad_norm_(params, 1.0)


if __name__ == "__main__":
    one_core()
    rounds = 9 if "--quick" in sys.argv else 31
    for what, shapes in SIZES.items():
        header(what)
        for name, options in OPTIMISERS:
            row(f"{name}({', '.join(f'{k}={v}' for k, v in options.items())})", *steps(name, options, shapes), rounds=rounds)
        row("clip_grad_norm_", *clips(shapes), rounds=rounds)
        print()
