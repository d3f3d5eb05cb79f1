"""A training step in NumPy (fromfound.numpy_nn) against the layers of chapter 04 and against torch.nn: time, as a ratio.

    OMP_NUM_THREADS=1 python bench/bench_numpy.py            # all rows; one thread, for NumPy's matmul too
    OMP_NUM_THREADS=1 python bench/bench_numpy.py --quick    # fewer rounds

Forward, cross-entropy, backward and a step of SGD with momentum, on the same numbers, in float64 and float32.
"""
import sys

import numpy as np
import torch
from side_by_side import medians, one_core
from torch import nn

from fromfound import layers, numpy_nn, optim


def steps(n, sizes, dtype):
    "Return one training step of NumPy's, ours and torch's, for a batch of n and a net of these widths."
    rng = np.random.default_rng(0)
    pairs = list(zip(sizes, sizes[1:]))
    chain = numpy_nn.Model(numpy_nn.cross_entropy)
    ours, theirs = [], []
    for i, (a, b) in enumerate(pairs):
        last = i == len(pairs) - 1
        chain.add(numpy_nn.Linear(a, b, rng), *([] if last else [numpy_nn.ReLU()]))
        ours += [layers.Linear(a, b), *([] if last else [layers.ReLU()])]
        theirs += [nn.Linear(a, b), *([] if last else [nn.ReLU()])]
    for layer in chain.layers: layer.params = {name: p.astype(dtype) for name, p in layer.params.items()}
    kind = getattr(torch, dtype)
    model, net = layers.Model(layers.Sequential(*ours).to(kind), layers.CrossEntropyLoss()), nn.Sequential(*theirs).to(kind)
    x, y = rng.normal(size=(n, sizes[0])).astype(dtype), rng.integers(0, sizes[-1], n)
    xt, yt = torch.from_numpy(x), torch.from_numpy(y)
    sgd = numpy_nn.SGD(1e-3, 0.9)
    our_sgd, their_sgd = optim.SGD(model.parameters(), 1e-3, 0.9), torch.optim.SGD(net.parameters(), 1e-3, 0.9)

    def numpy_step():
        chain.backward(chain.loss(chain.forward(x), y)[1])
        sgd.step(chain.params(), chain.grads())

    def our_step():
        our_sgd.zero_grad()
        model(xt, yt)
        model.backward()
        our_sgd.step()

    def their_step():
        their_sgd.zero_grad()
        nn.functional.cross_entropy(net(xt), yt).backward()
        their_sgd.step()

    return numpy_step, our_step, their_step


ROWS = [(32, (2, 64, 64, 3)), (64, (64, 128, 128, 10)), (512, (784, 512, 512, 10))]

if __name__ == "__main__":
    one_core()
    torch.manual_seed(0)
    print(f"{'batch, widths':32}{'':9}{'NumPy, µs':>11}{'ch. 04, µs':>12}{'torch, µs':>11}{'to ch. 04':>11}{'to torch':>10}")
    for n, sizes in ROWS:
        for dtype in ("float64", "float32"):
            a, b, c = medians(*steps(n, sizes, dtype), rounds=5 if "--quick" in sys.argv else 21)
            print(f"{f'{n}, ' + '-'.join(map(str, sizes)):32}{dtype:9}{a:11.0f}{b:12.0f}{c:11.0f}{a / b:11.2f}{a / c:10.2f}", flush=True)
