"""A training step on fromfound.engine against the same step on torch's autograd, 784-50-10, batch 64: ratios of time.

    python bench/bench_engine.py

Both sides do the same work from the same weights, in turns, in one process, on one thread and one core: forward, cross-entropy,
backward, and SGD in place. "the same operations" is torch's autograd on the very same expression, "torch.nn" uses torch's compiled linear
layers, cross-entropy and SGD.
"""
import torch
import torch.nn.functional as F
from side_by_side import medians, one_core

from fromfound.engine import Tensor

LR = 1e-3


def loss_of(x, target, w1, b1, w2, b2):
    logits = (x @ w1.T + b1).relu() @ w2.T + b2
    z = logits - logits.detach().data.amax(1, keepdim=True)
    return (z.exp().sum(1).log() - z[torch.arange(len(target)), target]).mean()


if __name__ == "__main__":
    torch.manual_seed(0)
    one_core()
    x, y = torch.randn(64, 784), torch.randint(0, 10, (64,))
    start = [torch.randn(50, 784) / 28, torch.zeros(50), torch.randn(10, 50) / 7, torch.zeros(10)]
    ours = [Tensor(t.clone(), True) for t in start]
    same, compiled = ([t.clone().requires_grad_() for t in start] for _ in range(2))
    optimizer = torch.optim.SGD(compiled, LR)

    def our_step():
        for p in ours: p.grad = None
        loss_of(Tensor(x), y, *ours).backward()
        for p in ours: p.data.sub_(p.grad.data, alpha=LR)

    def same_step():
        for p in same: p.grad = None
        loss_of(x, y, *same).backward()
        with torch.no_grad():
            for p in same: p.sub_(p.grad, alpha=LR)

    def compiled_step():
        optimizer.zero_grad()
        w1, b1, w2, b2 = compiled
        F.cross_entropy(F.linear(F.relu(F.linear(x, w1, b1)), w2, b2), y).backward()
        optimizer.step()

    times = medians(our_step, same_step, compiled_step)
    print(f"{'784-50-10, batch 64':32}{'µs':>8}{'ours / it':>12}")
    for name, time in zip(("fromfound.engine", "torch, the same operations", "torch.nn"), times): print(f"{name:32}{time:8.0f}{times[0] / time:12.2f}")
