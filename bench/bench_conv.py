"""fromfound.conv against torch.nn: forward and backward of one layer, as ratios of time (below 1: ours is faster).

    python bench/bench_conv.py

Both sides do the same work from the same weights, in turns, in one process, on one thread and one core. "input gradient" says
whether the gradient of the input is wanted, too: in a net, only the first layer's isn't.
"""
import torch
from side_by_side import medians, one_core
from torch import nn

from fromfound import conv


def steps(ours, theirs, x, input_grad):
    "Return our forward and backward pass, and torch's, under the same incoming gradient."
    if isinstance(ours, conv.Conv2d): theirs.load_state_dict(ours.state_dict())
    x_theirs = x.clone().requires_grad_(input_grad)
    g = torch.randn_like(theirs(x))

    def our_step():
        x.g = None
        ours.zero_grad()
        out = ours(x)
        out.g = g
        ours.backward(input_grad)

    def their_step():
        x_theirs.grad = None
        theirs.zero_grad()
        theirs(x_theirs).backward(g)

    return our_step, their_step


ROWS = [
    ("conv 1→8, 3×3, stride 2", conv.Conv2d, (1, 8, 3, 2), (64, 1, 28, 28), False),
    ("conv 1→8, 3×3, stride 2", conv.Conv2d, (1, 8, 3, 2), (64, 1, 28, 28), True),
    ("conv 8→16, 3×3, stride 2", conv.Conv2d, (8, 16, 3, 2), (64, 8, 14, 14), True),
    ("conv 16→32, 3×3", conv.Conv2d, (16, 32, 3), (32, 16, 32, 32), True),
    ("max pooling 2×2", conv.MaxPool2d, (2,), (64, 8, 28, 28), True),
    ("average pooling 2×2", conv.AvgPool2d, (2,), (64, 8, 28, 28), True),
]

if __name__ == "__main__":
    torch.manual_seed(0)
    one_core()
    print(f"{'layer':26}{'images':>18}{'input gradient':>16}{'ours, µs':>11}{'torch, µs':>11}{'ratio':>8}")
    for name, kind, args, shape, input_grad in ROWS:
        ours, theirs = medians(*steps(kind(*args), getattr(nn, kind.__name__)(*args), torch.randn(shape), input_grad))
        print(f"{name:26}{'×'.join(map(str, shape)):>18}{'yes' if input_grad else 'no':>16}{ours:11.0f}{theirs:11.0f}{ours / theirs:8.2f}")
