"""fromfound.autograd_fn against torch: values, first and second gradients, transforms, what is kept, errors, modules."""
import copy
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev, vmap
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from fromfound.autograd_fn import (
    CrossEntropyFunction, LinearFunction, LinearLayer, Module, MSELossFunction, ReLUFunction, SigmoidFunction,
)

THEIRS = {LinearFunction: F.linear, ReLUFunction: F.relu, SigmoidFunction: torch.sigmoid, MSELossFunction: F.mse_loss,
          CrossEntropyFunction: F.cross_entropy}


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


def rand(*shape): return torch.randn(shape, dtype=torch.double)


CASES = [
    *[(LinearFunction, (rand(*shape), rand(5, 3), rand(5))) for shape in [(3,), (4, 3), (2, 4, 3), (0, 3), (1, 3)]],
    (LinearFunction, (rand(4, 3), rand(5, 3))), (LinearFunction, (rand(3, 4).T, rand(3, 5).T, rand(10)[::2])),
    *[(f, (rand(*shape),)) for f in (ReLUFunction, SigmoidFunction) for shape in [(), (3,), (2, 4, 3), (0,)]],
    (SigmoidFunction, (torch.tensor([0.0, 800.0, -800.0], dtype=torch.double),)), (ReLUFunction, (torch.zeros(3).double(),)),
    *[(MSELossFunction, (rand(*shape), rand(*shape))) for shape in [(), (3,), (2, 4, 3)]],
    *[(CrossEntropyFunction, (scale * rand(4, 5), torch.tensor([0, 4, 2, 1]))) for scale in (1, 1e4)],
]
each = pytest.mark.parametrize("function, inputs", CASES, ids=[f"{f.__name__}-{i}" for i, (f, _) in enumerate(CASES)])


def leaves(inputs, wanted=range(3)):
    return [t.detach().requires_grad_(i in wanted) if t.is_floating_point() else t for i, t in enumerate(inputs)]


def wants(tensors): return [t for t in tensors if t.requires_grad]


@each
def test_values_and_gradients_are_torchs(function, inputs):
    floats = [i for i, t in enumerate(inputs) if t.is_floating_point()]
    for wanted in (w for n in range(1, len(floats) + 1) for w in itertools.combinations(floats, n)):
        ours, theirs = leaves(inputs, wanted), leaves(inputs, wanted)
        out, out_t = function.apply(*ours), THEIRS[function](*theirs)
        assert_close(out, out_t, rtol=1e-10, atol=1e-12)
        g = torch.randn_like(out)
        assert_close(torch.autograd.grad(out, wants(ours), g), torch.autograd.grad(out_t, wants(theirs), g), rtol=1e-10, atol=1e-12)


@each
def test_gradcheck_and_gradgradcheck(function, inputs):
    if any(t.abs().max() > 100 for t in inputs if t.numel() and t.is_floating_point()): pytest.skip("finite differences can't judge there")
    if function is ReLUFunction and (inputs[0] == 0).any(): pytest.skip("a kink")
    ours = leaves(inputs)
    assert gradcheck(function.apply, ours) and gradgradcheck(function.apply, ours)


@settings(max_examples=30, deadline=None)
@given(lead=st.lists(st.integers(0, 3), max_size=3), n_in=st.integers(1, 4), n_out=st.integers(1, 4), bias=st.booleans())
def test_linear_of_any_shape(lead, n_in, n_out, bias):
    inputs = leaves([rand(*lead, n_in), rand(n_out, n_in), *([rand(n_out)] if bias else [])])
    out, want = LinearFunction.apply(*inputs), F.linear(*inputs)
    g = torch.randn_like(want)
    assert_close(torch.autograd.grad(out, inputs, g), torch.autograd.grad(want, inputs, g))


@pytest.mark.parametrize("transform", [grad, jacrev, lambda f: jacrev(jacrev(f))])
def test_transforms(transform):
    y = rand(4, 3)
    def ours(x): return MSELossFunction.apply(SigmoidFunction.apply(x), y)
    def theirs(x): return F.mse_loss(torch.sigmoid(x), y)
    assert_close(transform(ours)(x := rand(4, 3)), transform(theirs)(x))
    assert_close(vmap(transform(ours))(x := rand(2, 4, 3)), vmap(transform(theirs))(x))


@pytest.mark.parametrize("wanted", [w for n in (1, 2, 3) for w in itertools.combinations(range(3), n)])
def test_linear_keeps_and_computes_only_what_is_wanted(wanted):
    inputs, kept = leaves([rand(4, 3), rand(5, 3), rand(5)], wanted), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        out = LinearFunction.apply(*inputs)
    assert sorted(kept) == sorted([(5, 3)] * (0 in wanted) + [(4, 3)] * (1 in wanted))
    with FlopCounterMode(display=False) as counter: out.sum().backward()
    assert counter.get_total_flops() == 2 * 4 * 3 * 5 * len({0, 1} & set(wanted))


def test_a_freed_graph_raises_and_a_change_in_place_is_noticed():
    x = rand(3).requires_grad_()
    out = SigmoidFunction.apply(x)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"): out.sum().backward()
    out = SigmoidFunction.apply(x)
    out.data_ptr(), out.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): out.sum().backward()


@pytest.mark.parametrize("function, args, message", [
    (LinearFunction, (rand(2, 3), rand(3, 4)), "did you mean weight.T?"),
    (LinearFunction, (rand(2, 3), rand(5, 3), rand(1)), "bias is (1,), weight is (5, 3)"),
    (MSELossFunction, (rand(5, 1), rand(5)), "did you mean input.squeeze(-1)?"),
    (CrossEntropyFunction, (rand(2, 3), torch.tensor([0, 3])), "labels must be from 0 to 2"),
    (CrossEntropyFunction, (rand(3), torch.tensor(1)), "not (N, C) and (N,)"),
])
def test_errors_are_those_of_the_plain_functions(function, args, message):
    with pytest.raises(ValueError, match=re.escape(message)): function.apply(*args)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layer_is_nn_linear(bias):
    torch.manual_seed(3)
    ours = LinearLayer(7, 5, bias)
    torch.manual_seed(3)
    theirs = nn.Linear(7, 5, bias)
    for (n, p), (m, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True): assert n == m and torch.equal(p, q)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 7)
    assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward(), theirs(x).square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters()): assert_close(p.grad, q.grad)


class Net(Module):
    def __init__(self, n):
        self.first, self.scale = LinearLayer(4, n), nn.Parameter(torch.ones(n))
        self.register_buffer("mean", torch.zeros(n))

    def forward(self, x): return ReLUFunction.apply(self.first(x)) * self.scale - self.mean


class Polite(Net):
    def __init__(self, n):
        super().__init__(n)
        self.last = LinearLayer(n, 2)

    def forward(self, x): return self.last(super().forward(x))


def test_module_needs_no_init():
    net, x = Polite(3), torch.randn(5, 4)
    assert [n for n, _ in net.named_parameters()] == ["scale", "first.weight", "first.bias", "last.weight", "last.bias"]
    assert "mean" in net.state_dict() and isinstance(net, nn.Module)
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    twin = copy.deepcopy(net)
    assert_close(twin(x), net(x))
    other = Polite(3)
    assert other.first is not net.first
    assert torch.optim.SGD(nn.Sequential(net, other).parameters(), lr=0.1)


def test_a_late_super_init_does_no_harm():
    class Late(Module):
        def __init__(self):
            self.layer = LinearLayer(2, 2)
            super().__init__()

    assert len(list(Late().parameters())) == 2
