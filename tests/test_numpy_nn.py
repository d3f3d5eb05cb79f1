"""fromfound.numpy_nn against torch and the torch chapters, by finite differences, and without torch at all."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fromfound import layers, numpy_nn, optim
from fromfound.numpy_nn import (SGD, Adam, Dropout, Layer, Linear, Model, ReLU, Sigmoid, Tanh, accuracy, check_grads,
                                cross_entropy, kaiming_normal, mse_loss, xavier_normal)

TIGHT = dict(rtol=1e-9, atol=1e-9)
close = lambda a, b: np.testing.assert_allclose(a, b, **TIGHT)


@pytest.fixture
def rng(): return np.random.default_rng(0)


def net_of(rng, activation="ReLU", sizes=(6, 8, 5, 3), loss=cross_entropy):
    net = Model(loss)
    for a, b in zip(sizes, sizes[1:]): net.add(Linear(a, b, rng), getattr(numpy_nn, activation)())
    net.layers.pop()
    return net


def in_torch(net):
    "The same net in torch.nn and in fromfound.layers, with the same numbers."
    theirs, ours = [], []
    for layer in net.layers:
        args = layer.params["weight"].shape[::-1] if isinstance(layer, Linear) else ()
        theirs.append(getattr(nn, type(layer).__name__)(*args))
        ours.append(getattr(layers, type(layer).__name__)(*args))
    state = {name: torch.tensor(p) for name, p in net.params().items()}
    theirs, ours = nn.Sequential(*theirs).double(), layers.Sequential(*ours).to(torch.float64)
    theirs.load_state_dict(state)
    ours.load_state_dict(state)
    return theirs, ours


# ---- against torch

@pytest.mark.parametrize("activation", ["ReLU", "Sigmoid", "Tanh"])
@pytest.mark.parametrize("loss", [cross_entropy, mse_loss])
def test_values_and_gradients_are_those_of_torch_and_of_chapter_04(rng, activation, loss):
    net = net_of(rng, activation, loss=loss)
    for name, p in net.params().items():
        if name.endswith("bias"): p[...] = rng.normal(size=p.shape)
    theirs, ours = in_torch(net)
    x, y = rng.normal(size=(7, 6)), rng.integers(0, 3, 7) if loss is cross_entropy else rng.normal(size=(7, 3))
    value, grad = loss(net.forward(x), y)
    dx = net.backward(grad)
    xt = torch.tensor(x, requires_grad=True)
    want = getattr(nn.functional, loss.__name__)(theirs(xt), torch.tensor(y))
    want.backward()
    close(value, want.item())
    close(dx, xt.grad)
    for name, p in theirs.named_parameters(): close(net.grads()[name], p.grad)
    model = layers.Model(ours, layers.CrossEntropyLoss() if loss is cross_entropy else layers.MSELoss())
    x4 = torch.tensor(x)
    close(value, model(x4, torch.tensor(y)))
    model.backward(input_grad=True)
    close(dx, x4.g)
    for name, p in ours.named_parameters(): close(net.grads()[name], p.g)


@pytest.mark.parametrize("name, options", [
    ("SGD", dict(lr=0.1)), ("SGD", dict(lr=0.1, momentum=0.9)), ("SGD", dict(lr=0.1, momentum=0.5, weight_decay=0.1)),
    ("Adam", dict(lr=0.1)), ("Adam", dict(lr=0.01, betas=(0.8, 0.95), eps=1e-3)), ("Adam", dict(lr=0.1, weight_decay=0.1)), ("Adam", {}),
])
@pytest.mark.parametrize("module", [torch.optim, optim])
def test_optimizers_over_20_steps(rng, name, options, module):
    params = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=4)}
    same = [torch.tensor(p, requires_grad=True) for p in params.values()]
    mine, other = getattr(numpy_nn, name)(**options), getattr(module, name)(same, **options)
    for _ in range(20):
        grads = {k: rng.normal(size=p.shape) for k, p in params.items()}
        kept = {k: g.copy() for k, g in grads.items()}
        for t, g in zip(same, grads.values()): t.grad = t.g = torch.tensor(g)
        mine.step(params, grads)
        other.step()
        for p, t in zip(params.values(), same): close(p, t.detach())
        assert all(np.array_equal(grads[k], kept[k]) for k in grads)


def test_a_net_trains_along_torchs_curve(rng):
    net = net_of(rng)
    theirs, _ = in_torch(net)
    x, y = rng.normal(size=(50, 6)), rng.integers(0, 3, 50)
    other, order = torch.optim.Adam(theirs.parameters(), lr=0.01, weight_decay=0.01), np.random.default_rng(3)
    history = net.fit(x, y, Adam(lr=0.01, weight_decay=0.01), 5, batch_size=16, rng=3)
    for epoch in range(5):
        total = 0.0
        rows = order.permutation(50)
        for part in (rows[:16], rows[16:32], rows[32:48], rows[48:]):
            other.zero_grad()
            loss = nn.functional.cross_entropy(theirs(torch.tensor(x[part])), torch.tensor(y[part]))
            loss.backward()
            other.step()
            total += loss.item() * len(part)
        close(history["loss"][epoch], total / 50)
    close(net.predict(x), theirs(torch.tensor(x)).detach())


def test_initialisers(rng):
    for init, std in [(kaiming_normal, (2 / 400) ** 0.5), (xavier_normal, (2 / 700) ** 0.5)]:
        w = init((300, 400), rng)
        assert w.shape == (300, 400) and abs(w.std() / std - 1) < 0.01 and abs(w.mean()) < std / 50


# ---- finite differences

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4), n=st.integers(1, 5),
       activation=st.sampled_from(["ReLU", "Sigmoid", "Tanh"]), loss=st.sampled_from([cross_entropy, mse_loss]))
def test_finite_differences_over_random_nets(seed, sizes, n, activation, loss):
    rng = np.random.default_rng(seed)
    net = net_of(rng, activation, sizes, loss)
    for name, p in net.params().items(): p += rng.normal(size=p.shape)  # biases too, so that no ReLU sits on its kink
    x = rng.normal(size=(n, sizes[0]))
    before = x.copy(), {name: p.copy() for name, p in net.params().items()}
    check_grads(net, x, rng.integers(0, sizes[-1], n) if loss is cross_entropy else rng.normal(size=(n, sizes[-1])))
    assert np.array_equal(x, before[0]) and all(np.array_equal(p, before[1][name]) for name, p in net.params().items())


class NoBias(Linear):
    def backward(self, grad):
        dx = super().backward(grad)
        self.grads["bias"] = grad.mean(0)
        return dx


class Transposed(Linear):
    def backward(self, grad):
        super().backward(grad)
        return grad @ self.params["weight"].T


class HalfTanh(Tanh):
    def backward(self, grad): return grad * (1 - self.out)


@pytest.mark.parametrize("wrong", [NoBias, Transposed, HalfTanh])
def test_check_grads_finds_mistakes(rng, wrong):
    middle = wrong() if wrong is HalfTanh else wrong(4, 4, rng)
    net = Model(mse_loss).add(Linear(3, 4, rng), middle, Tanh(), Linear(4, 2, rng))
    with pytest.raises(AssertionError, match="slope"): check_grads(net, rng.normal(size=(5, 3)), rng.normal(size=(5, 2)))


# ---- dropout

@pytest.mark.parametrize("p", [0, 0.1, 0.5, 0.9])
def test_dropout_statistics_and_its_mask(rng, p):
    layer, ones = Dropout(p, rng), np.ones((400, 500))
    out = layer.forward(ones)
    assert abs((out == 0).mean() - p) < 0.005 and abs(out.mean() - 1) < 0.02
    close(np.unique(out[out != 0]), [1 / (1 - p)])
    assert np.array_equal(layer.backward(2 * ones), 2 * out)
    if p: assert not np.array_equal(layer.forward(ones), out)
    layer.training = False
    assert np.array_equal(layer.forward(ones), ones) and np.array_equal(layer.backward(ones), ones)


def test_fit_trains_with_dropout_and_predicts_without(rng):
    net = Model(mse_loss).add(Linear(4, 50, rng), Dropout(0.5, rng), Linear(50, 1, rng))
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 1))
    assert np.array_equal(net.predict(x), net.predict(x)) and not np.array_equal(net.forward(x), net.forward(x))
    history = net.fit(x, y, SGD(), 2, valid=(x, y), metric=lambda out, y: 7, rng=0)
    assert list(history) == ["loss", "valid_loss", "metric"] and history["metric"] == [7, 7]
    close(history["valid_loss"][-1], mse_loss(net.predict(x), y)[0])


# ---- numbers, seeds, files, errors

def test_extreme_numbers():
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        close(Sigmoid().forward(np.array([-1000.0, 0, 2, 1000])), [0, 0.5, 1 / (1 + np.exp(-2)), 1])
        loss, grad = cross_entropy(np.array([[1000.0, 0, -1000], [-1000.0, 0, 1000]]), np.array([0, 0]))
    assert loss == 1000 and np.array_equal(grad, [[0, 0, 0], [-0.5, 0, 0.5]])


def test_equal_seeds_give_equal_runs():
    def run(seed):
        rng = np.random.default_rng(seed)
        net = Model(cross_entropy).add(Linear(4, 8, rng), ReLU(), Dropout(0.5, rng), Linear(8, 3, rng))
        net.fit(np.arange(80.0).reshape(20, 4) / 80, np.arange(20) % 3, SGD(0.1, 0.9), 3, 6, rng=rng)
        return net.params()
    one, same, other = run(0), run(0), run(1)
    assert all(np.array_equal(one[k], same[k]) for k in one) and not np.array_equal(one["0.weight"], other["0.weight"])


def test_float32_stays_float32(rng):
    net = net_of(rng)
    for layer in net.layers: layer.params = {k: p.astype("float32") for k, p in layer.params.items()}
    x, y = rng.normal(size=(7, 6)).astype("float32"), rng.integers(0, 3, 7)
    for optimizer in (SGD(0.1, 0.9, 0.1), Adam(weight_decay=0.1)):
        net.fit(x, y, optimizer, 2, rng=0)
        state = optimizer.velocity.values() if isinstance(optimizer, SGD) else [a for pair in optimizer.averages.values() for a in pair]
        assert {a.dtype for a in [net.predict(x), *net.params().values(), *net.grads().values(), *state]} == {np.dtype("float32")}


def test_save_and_load(rng, tmp_path):
    one, two, other = net_of(rng), net_of(rng), net_of(rng, sizes=(6, 8, 3))
    x = rng.normal(size=(4, 6))
    one.save(tmp_path / "net.npz")
    two.load(str(tmp_path / "net.npz"))
    assert np.array_equal(one.predict(x), two.predict(x)) and [p.name for p in tmp_path.iterdir()] == ["net.npz"]
    before = other.predict(x)
    with pytest.raises(ValueError, match="another model"): other.load(tmp_path / "net.npz")
    assert np.array_equal(other.predict(x), before)


@pytest.mark.parametrize("call, text", [
    (lambda: mse_loss(np.ones((4, 1)), np.ones(4)), r"input is \(4, 1\), but target is \(4,\)"),
    (lambda: cross_entropy(np.ones((4, 3)), np.zeros((4, 1), int)), r"not \(4, 3\) and \(4, 1\)"),
    (lambda: cross_entropy(np.ones(3), np.zeros((), int)), "are needed"),
    (lambda: cross_entropy(np.ones((2, 3)), np.array([0, -1])), "from 0 to 2, not from -1 to 0"),
    (lambda: cross_entropy(np.ones((2, 3)), np.array([0, 3])), "from 0 to 2, not from 0 to 3"),
    (lambda: accuracy(np.ones((4, 3)), np.zeros((4, 1), int)), r"labels \(4, 1\)"),
    (lambda: Linear(3, 2, np.random.default_rng(0)).forward(np.ones(3)), r"\(N, 3\), not \(3,\)"),
    (lambda: Linear(3, 2, np.random.default_rng(0)).forward(np.ones((2, 2, 3))), r"\(N, 3\), not \(2, 2, 3\)"),
    (lambda: Dropout(1, None), "p is 1"), (lambda: Dropout(-0.1, None), "p is -0.1"),
    (lambda: Model(mse_loss).add(*[ReLU()] * 2), "in the model already"),
    (lambda: Model(mse_loss).fit(np.ones((3, 1)), np.ones((4, 1)), SGD(), 1), "3 examples in x, but 4 in y"),
    (lambda: SGD().step({"p": np.ones((3, 2))}, {"p": np.ones(2)}), r"p is \(3, 2\), but its gradient is \(2,\)"),
    (lambda: Adam().step({"p": np.ones((3, 2))}, {"p": 1.0}), r"p is \(3, 2\), but its gradient is \(\)"),
])
def test_what_would_go_wrong_silently_is_refused(call, text):
    with pytest.raises(ValueError, match=text): call()


def test_nobody_writes_parameters_into_the_class():
    with pytest.raises(TypeError): ReLU().params["weight"] = np.ones(3)
    with pytest.raises(NotImplementedError): Layer().forward(np.ones(3))


# ---- without torch

WITHOUT = "import sys; sys.modules['torch'] = None\n"


def python(code, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)


def test_the_module_needs_no_torch_and_imports_none(tmp_path):
    done = python(WITHOUT + "import fromfound.numpy_nn", tmp_path)
    assert done.returncode == 0, done.stderr
    done = python("import sys, fromfound.numpy_nn; print('torch' in sys.modules)", tmp_path)
    assert done.stdout == "False\n", done.stderr


def test_the_notebook_runs_without_torch(tmp_path):
    code = WITHOUT + f"""
import json, pathlib, warnings
warnings.simplefilter("error")
cells = json.loads(pathlib.Path({str(ROOT / 'nbs' / '11_numpy.ipynb')!r}).read_text(encoding="utf-8"))["cells"]
for cell in cells:
    source = "".join(cell["source"])
    if cell["cell_type"] == "code" and "google.colab" not in source: exec(compile(source, source[:60], "exec"), globals())
print("all cells ran", sys.modules["torch"])
"""
    done = python(code, tmp_path)
    assert done.stdout.endswith("all cells ran None\n"), done.stdout[-500:] + done.stderr
