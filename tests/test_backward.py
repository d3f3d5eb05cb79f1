"""Every *_grad against PyTorch's autograd, with shapes drawn by hypothesis; numerical_grad, add_grad and FunctionPair."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fromfound.backward import (
    FunctionPair, add_grad, check_grads, cross_entropy_grad, linear_grad, mse_loss_grad, numerical_grad, relu_grad,
    sigmoid_grad, tanh_grad,
)
from fromfound.forward import cross_entropy, linear, mse_loss, relu, sigmoid, tanh

ELEMENTWISE = {"relu": (torch.relu, relu_grad), "sigmoid": (torch.sigmoid, sigmoid_grad), "tanh": (torch.tanh, tanh_grad)}
few = settings(max_examples=25, deadline=None)
leading = st.lists(st.integers(0, 3), max_size=3).map(tuple)
seeds = st.integers(0, 1000)


def rand(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def theirs(f, *inputs, g=None):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(f(*leaves), leaves, g)


def same(got, want): assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ELEMENTWISE)
@few
@given(shape=leading, seed=seeds)
def test_activations(name, shape, seed):
    forward, grad = ELEMENTWISE[name]
    x = 4 * rand(*shape, seed=seed)
    out = forward(x)
    g = out.g = rand(*shape, seed=seed + 1)
    kept = g.clone()
    for times in (1, 2):  # the second time it is added
        grad(x, out)
        same(x.g, times * theirs(forward, x, g=g)[0])
    assert out.g is g and torch.equal(g, kept) and x.g is not g


@few
@given(shape=leading, n_in=st.integers(0, 4), n_out=st.integers(0, 4), bias=st.booleans(), seed=seeds)
def test_linear(shape, n_in, n_out, bias, seed):
    tensors = [rand(*shape, n_in, seed=seed), rand(n_out, n_in, seed=seed + 1)] + [rand(n_out, seed=seed + 2)] * bias
    out = F.linear(*tensors)
    out.g = rand(*out.shape, seed=seed + 3)
    linear_grad(tensors[0], out, *tensors[1:])
    for t, want in zip(tensors, theirs(lambda x, w, *b: x @ w.T + (b[0] if b else 0), *tensors, g=out.g)): same(t.g, want)


@few
@given(shape=st.lists(st.integers(1, 3), max_size=3), seed=seeds)
def test_mse(shape, seed):
    x, y = rand(*shape, seed=seed), rand(*shape, seed=seed + 1)
    mse_loss_grad(x, y)
    same(x.g, theirs(F.mse_loss, x, y)[0])
    assert not hasattr(y, "g")


@few
@given(n=st.integers(1, 5), classes=st.integers(1, 5), scale=st.sampled_from([1, 1000]), seed=seeds)
def test_cross_entropy(n, classes, scale, seed):
    x, y = scale * rand(n, classes, seed=seed), torch.randint(classes, (n,))
    cross_entropy_grad(x, y)
    same(x.g, theirs(lambda x: F.cross_entropy(x, y), x)[0])


def test_autograds_own_grad_is_left_alone_and_parameters_work():
    w = torch.nn.Parameter(rand(2, 3))
    x = rand(4, 3)
    out = linear(x, w)
    out.sum().backward()
    before = w.grad.clone()
    out.g = torch.ones_like(out)
    linear_grad(x, out, w)
    same(w.g, w.grad)
    assert torch.equal(w.grad, before) and not w.g.requires_grad


def test_refusals():
    x = rand(4, 3)
    with pytest.raises(ValueError, match=r"the gradient is \(3,\), but the tensor is \(4, 3\)"): add_grad(x, rand(3))
    with pytest.raises(ValueError, match="did you mean"): mse_loss_grad(rand(4, 1), rand(4))
    with pytest.raises(ValueError, match="labels must be from 0 to 2"): cross_entropy_grad(x, torch.tensor([0, 1, 2, 3]))
    assert not hasattr(x, "g")


@few
@given(shape=st.lists(st.integers(0, 3), max_size=3), seed=seeds)
def test_numerical_grad(shape, seed):
    x = rand(*shape, seed=seed)
    kept = x.clone()
    assert_close(numerical_grad(lambda x: (x**3).sum() + x.sin().sum(), x), 3 * x**2 + x.cos(), rtol=1e-6, atol=1e-8)
    assert torch.equal(x, kept)
    assert_close(numerical_grad(lambda x: x.square().sum(), x, eps=0.1), 2 * x, rtol=1e-6, atol=1e-8)


def test_numerical_grad_in_float32_and_far_from_0():
    x = torch.tensor([1e6, -3.0, 0.0])
    assert_close(numerical_grad(lambda x: x.double().square().sum(), x), 2 * x, rtol=1e-2, atol=1e-2)


def test_function_pair_goes_backward_last_call_first():
    pair = FunctionPair(relu, relu_grad)
    x, y = rand(3), rand(3, seed=1)
    out_x, out_y = pair(x), pair(y)
    out_x.g = out_y.g = torch.ones(3, dtype=torch.float64)
    pair.backward()
    assert hasattr(y, "g") and not hasattr(x, "g")
    pair.backward()
    same(x.g, (x > 0).double())


def test_all_pass_check_grads():
    check_grads(FunctionPair(linear, linear_grad), rand(4, 3), rand(2, 3, seed=1), rand(2, seed=2))
    check_grads(FunctionPair(linear, linear_grad), rand(2, 4, 3), rand(2, 3, seed=1))
    for forward, grad in ((relu, relu_grad), (sigmoid, sigmoid_grad), (tanh, tanh_grad)):
        check_grads(FunctionPair(forward, grad), rand(4, 3))
    check_grads(FunctionPair(mse_loss, mse_loss_grad, loss=True), rand(4, 3), rand(4, 3, seed=1))
    check_grads(FunctionPair(cross_entropy, cross_entropy_grad, loss=True), rand(4, 3), torch.tensor([0, 2, 1, 1]))
