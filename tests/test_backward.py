"""Every *_grad against PyTorch's autograd, with shapes drawn by hypothesis; what they refuse; numerical_grad and FunctionPair."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fromfound.backward import (FunctionPair, add_grad, cross_entropy_grad, incoming_grad, linear_grad, mse_loss_grad, numerical_grad,
                                relu_grad, sigmoid_grad, tanh_grad)
from fromfound.forward import cross_entropy, linear, mse_loss, relu, sigmoid, tanh

ELEMENTWISE = {"relu": (torch.relu, relu_grad), "sigmoid": (torch.sigmoid, sigmoid_grad), "tanh": (torch.tanh, tanh_grad)}
few = settings(max_examples=25, deadline=None)
leading = st.lists(st.integers(0, 3), min_size=0, max_size=3).map(tuple)
seeds = st.integers(0, 1000)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def theirs(f, *inputs, g=None):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = f(*leaves)
    return torch.autograd.grad(out, leaves, torch.ones_like(out) if g is None else g)


def same(got, want): assert_close(got, want, rtol=1e-10, atol=1e-10)


# --- the gradients

@pytest.mark.parametrize("name", ELEMENTWISE)
@few
@given(shape=leading, seed=seeds)
def test_elementwise(name, shape, seed):
    forward, grad = ELEMENTWISE[name]
    x = 4 * rand(*shape, seed=seed)
    out = forward(x)
    out.g = rand(*shape, seed=seed + 1)
    grad(x, out)
    same(x.g, theirs(forward, x, g=out.g)[0])


@few
@given(shape=leading, n_in=st.integers(0, 4), n_out=st.integers(0, 4), bias=st.booleans(), seed=seeds)
def test_linear(shape, n_in, n_out, bias, seed):
    tensors = [rand(*shape, n_in, seed=seed), rand(n_out, n_in, seed=seed + 1)] + [rand(n_out, seed=seed + 2)] * bias
    out = F.linear(*tensors)
    out.g = rand(*out.shape, seed=seed + 3)
    linear_grad(tensors[0], out, *tensors[1:])
    for t, want in zip(tensors, theirs(lambda x, w, *b: x @ w.T + (b[0] if b else 0), *tensors, g=out.g)): same(t.g, want)


@few
@given(shape=leading.filter(lambda s: 0 not in s), seed=seeds)
def test_mse(shape, seed):
    input, target = rand(*shape, seed=seed), rand(*shape, seed=seed + 1)
    mse_loss_grad(input, target)
    same(input.g, theirs(lambda x: F.mse_loss(x, target), input)[0])
    assert not hasattr(target, "g")


@few
@given(rest=st.lists(st.integers(1, 3), max_size=2), n=st.integers(0, 4), classes=st.integers(1, 5), seed=seeds, large=st.booleans(),
       dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]), ignoring=st.booleans())
def test_cross_entropy(rest, n, classes, seed, large, dtype, ignoring):
    shape = (n, classes, *rest) if n else (classes,)  # n = 0 stands for a single row
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (n, *rest) if n else (), generator=generator).to(dtype)
    if ignoring and dtype != torch.uint8 and target.numel() > 1: target.view(-1)[::2] = -100
    input = rand(*shape, seed=seed) * (100 if large else 1)
    if (target == -100).all() and target.dtype != torch.uint8: return
    cross_entropy_grad(input, target)
    same(input.g, theirs(lambda x: F.cross_entropy(x, target.long()), input)[0])


def test_cross_entropy_of_logits_far_apart():
    input = torch.tensor([[0., 1000.], [1000., 0.]])
    cross_entropy_grad(input, torch.tensor([0, 0]))
    assert_close(input.g, torch.tensor([[-.5, .5], [0., 0.]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    x, w, b = (rand(*s).to(dtype) for s in [(4, 3), (2, 3), (2,)])
    out = F.linear(x, w, b)
    out.g = rand(4, 2, seed=1).to(dtype)
    linear_grad(x, out, w, b)
    assert {t.g.dtype for t in (x, w, b)} == {dtype}
    for forward, grad in ELEMENTWISE.values():
        x = rand(4, 3).to(dtype)
        out = forward(x)
        out.g = rand(4, 3, seed=1).to(dtype)
        grad(x, out)
        assert_close(x.g, theirs(forward, x, g=out.g)[0], **({} if dtype.itemsize > 2 else dict(rtol=.02, atol=1e-3)))
    x = rand(4, 3).to(dtype)
    mse_loss_grad(x, torch.zeros_like(x))
    assert x.g.dtype == dtype
    x = rand(4, 3).to(dtype)
    cross_entropy_grad(x, torch.tensor([0, 1, 2, 0]))
    assert x.g.dtype == dtype
    want = theirs(lambda x: F.cross_entropy(x, torch.tensor([0, 1, 2, 0])), x.double())[0]  # rounded once, at the end
    assert_close(x.g, want.to(dtype), **({} if dtype.itemsize > 2 else dict(rtol=.01, atol=1e-3)))


def test_relu_at_zero_and_nan_and_infinity():
    x = torch.tensor([0., -0., math.nan, math.inf, -1.])
    out = torch.relu(x)
    out.g = torch.tensor([1., 1., 2., 3., math.inf])
    relu_grad(x, out)
    assert_close(x.g, theirs(torch.relu, x, g=out.g)[0], equal_nan=True)
    assert_close(x.g, torch.tensor([0., 0., 2., 3., 0.]))


def test_not_contiguous():
    x, w = rand(6, 4).T[:, ::2], rand(3, 2).T
    out = F.linear(x, w)
    out.g = rand(2, 4).T
    linear_grad(x, out, w)
    for t, want in zip((x, w), theirs(F.linear, x, w, g=out.g)): same(t.g, want)
    out.g = rand(1, 2).expand(4, 2)
    x.g = w.g = None
    linear_grad(x, out, w)
    same(w.g, theirs(F.linear, x, w, g=out.g)[1])


def test_tensors_that_require_grad():
    x, w, b = (rand(*s).requires_grad_() for s in [(4, 3), (2, 3), (2,)])
    out = linear(x, w, b)
    out.g = torch.ones_like(out)
    linear_grad(x, out, w, b)
    assert not any(t.g.requires_grad or t.g.grad_fn is not None for t in (x, w, b))
    assert all(t.grad is None for t in (x, w, b))
    for forward, grad in (relu, relu_grad), (sigmoid, sigmoid_grad), (tanh, tanh_grad):
        h = x * 2
        out = forward(h)
        out.g = torch.ones_like(out)
        grad(h, out)
        assert not h.g.requires_grad
    loss = mse_loss(x, torch.zeros(4, 3, dtype=torch.float64))
    x.g = None
    mse_loss_grad(x, torch.zeros(4, 3, dtype=torch.float64))
    loss.backward()
    same(x.g, x.grad)
    assert not x.g.requires_grad
    cross_entropy_grad(x, torch.tensor([0, 1, 2, 0]))
    assert not x.g.requires_grad


# --- adding, and what is left alone

CASES = {
    "linear": (linear_grad, F.linear, [(4, 3), (2, 3), (2,)]),
    "relu": (relu_grad, torch.relu, [(4, 3)]),
    "sigmoid": (sigmoid_grad, torch.sigmoid, [(4, 3)]),
    "tanh": (tanh_grad, torch.tanh, [(4, 3)]),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_added(name):
    grad, forward, shapes = CASES[name]
    inputs = [rand(*s, seed=k) for k, s in enumerate(shapes)]
    out = forward(*inputs)
    out.g = rand(*out.shape, seed=9)
    before = [t.clone() for t in (*inputs, out, out.g)]
    grad(inputs[0], out, *inputs[1:])
    once = [t.g for t in inputs]
    copies = [g.clone() for g in once]
    grad(inputs[0], out, *inputs[1:])
    for t, g, c in zip(inputs, once, copies):
        same(t.g, 2 * c)
        assert torch.equal(g, c)  # whoever held the old .g sees no change
    for t, b in zip((*inputs, out, out.g), before): assert torch.equal(t, b)
    assert not {t.g.untyped_storage().data_ptr() for t in inputs} & {t.untyped_storage().data_ptr() for t in (*inputs, out, out.g)}


def test_losses_add():
    x, t, y = rand(4, 3), rand(4, 3, seed=1), torch.tensor([0, 1, 2, 0])
    mse_loss_grad(x, t)
    cross_entropy_grad(x, y)
    same(x.g, theirs(lambda x: F.mse_loss(x, t) + F.cross_entropy(x, y), x)[0])


def test_x_plus_relu():
    x = torch.tensor([3., -3.])
    r = torch.relu(x)
    out = x + r
    out.g = torch.ones(2)
    add_grad(x, out.g.clone()); add_grad(r, out.g.clone())
    relu_grad(x, r)
    assert_close(x.g, torch.tensor([2., 1.]))


# --- errors, and nothing written after one

WRONG_G = {
    "missing": (None, RuntimeError, "out.g is not set"),
    "broadcasts": (torch.ones(1, 2, dtype=torch.float64), ValueError, r"out.g is \(1, 2\), but out is \(4, 2\)"),
    "transposed": (torch.ones(2, 4, dtype=torch.float64), ValueError, r"out.g is \(2, 4\)"),
    "one number": (torch.tensor(1.0, dtype=torch.float64), ValueError, r"out.g is \(\)"),
    "float32": (torch.ones(4, 2), TypeError, "float32"),
    "integers": (torch.ones(4, 2, dtype=torch.int64), TypeError, "int64"),
    "a list": ([[1.0] * 2] * 4, TypeError, "list"),
    "a number": (1.0, TypeError, "float"),
}


@pytest.mark.parametrize("name", WRONG_G)
@pytest.mark.parametrize("op", ["linear", "relu", "sigmoid", "tanh"])
def test_wrong_out_g(op, name):
    g, error, match = WRONG_G[name]
    grad, forward, _ = CASES[op]
    inputs = [rand(4, 3), rand(2, 3), rand(2)] if op == "linear" else [rand(4, 2)]
    out = forward(*inputs)
    if g is not None: out.g = g
    old = torch.ones_like(inputs[-1])
    inputs[-1].g = old
    with pytest.raises(error, match=match): grad(inputs[0], out, *inputs[1:])
    assert inputs[-1].g is old and (old == 1).all()
    assert not any(hasattr(t, "g") for t in inputs[:-1])
    assert getattr(out, "g", None) is g


def test_wrong_inputs():
    x, w, b = rand(4, 3), rand(2, 3), rand(2)
    out = linear(x, w, b)
    out.g = torch.ones_like(out)
    wrong = [((x.T, out, w, b), ValueError), ((x, out, w.T, b), ValueError), ((x, out, w, rand(3)), ValueError), ((x[:3], out, w, b), ValueError),
             ((x.float(), out, w, b), TypeError), ((x.tolist(), out, w, b), TypeError), ((x, out.tolist(), w, b), TypeError),
             ((x, out, w, rand(2, 1)), ValueError), ((x.long(), out, w, b), TypeError), ((torch.tensor(1.), out, w, b), ValueError)]
    for arguments, error in wrong:
        with pytest.raises(error, match="linear_grad"): linear_grad(*arguments)
    for grad in relu_grad, sigmoid_grad, tanh_grad:
        with pytest.raises(ValueError, match=grad.__name__): grad(x[:3], x)
        with pytest.raises(TypeError, match=grad.__name__): grad(x.long(), x)
        with pytest.raises(TypeError, match=grad.__name__): grad(None, x)
    for arguments, error in [((x, x[:1]), ValueError), ((x, x[:, 0]), ValueError), ((rand(4, 1), rand(4)), ValueError), ((x, x.float()), TypeError),
                             ((x, x.long()), TypeError), ((x, None), TypeError), ((rand(0), rand(0)), ValueError)]:
        with pytest.raises(error, match="mse_loss_grad"): mse_loss_grad(*arguments)
    y = torch.tensor([0, 1, 2, 0])
    for arguments, error in [((x, y[:3]), ValueError), ((x, y + 1), ValueError), ((x, y - 1), ValueError), ((x, y.double()), TypeError),
                             ((x, y[:, None]), ValueError), ((x, torch.full((4,), -100)), ValueError), ((x[:0], y[:0]), ValueError),
                             ((x, y.tolist()), TypeError), ((x.long(), y), TypeError), ((x, y == 1), TypeError)]:
        with pytest.raises(error, match="cross_entropy_grad"): cross_entropy_grad(*arguments)
    with pytest.raises(NotImplementedError): cross_entropy_grad(x, x.softmax(1))
    assert not any(hasattr(t, "g") for t in (x, w, b))


def test_add_grad():
    t = torch.zeros(2, 3)
    for wrong, error in [(torch.ones(3), ValueError), (torch.ones(1, 3), ValueError), (torch.ones(()), ValueError), (torch.ones(2, 3).double(), TypeError)]:
        with pytest.raises(error, match="add_grad"): add_grad(t, wrong)
        assert getattr(t, "g", None) is None
    g = torch.ones(2, 3)
    add_grad(t, g)
    assert t.g is g
    add_grad(t, g)
    assert_close(t.g, 2 * g)
    assert (g == 1).all()
    t.g = torch.ones(3)  # left by somebody else
    with pytest.raises(ValueError, match="so far"): add_grad(t, g)


def test_incoming_grad_names_the_caller_only_when_needed():
    class Who:
        def __str__(self): raise KeyError("formatted")
    out = torch.zeros(2)
    out.g = torch.ones(2)
    assert incoming_grad(Who(), out) is out.g
    with pytest.raises(RuntimeError, match="my layer: out.g"): incoming_grad("my layer", torch.zeros(2))


# --- numerical_grad

@few
@given(shape=leading, seed=seeds)
def test_numerical_grad(shape, seed):
    x = rand(*shape, seed=seed)
    w = rand(*shape, seed=seed + 1)
    f = lambda x: (x.sin() * w).sum() + (x * x).sum()
    before = x.clone()
    assert_close(numerical_grad(f, x), theirs(f, x)[0], rtol=1e-7, atol=1e-8)
    assert torch.equal(x, before)


def test_numerical_grad_in_other_dtypes_and_layouts():
    f = lambda x: (x * x).sum()
    for dtype, tol in (torch.float32, 2e-3), (torch.float64, 1e-8):
        x = rand(3, 2).to(dtype)
        assert numerical_grad(f, x).dtype == dtype
        assert_close(numerical_grad(f, x), 2 * x, rtol=tol, atol=tol)
    x = rand(3, 1).expand(3, 2)
    assert_close(numerical_grad(f, x), 2 * x, rtol=1e-8, atol=1e-8)
    x = rand(3, 2).T.requires_grad_()
    g = numerical_grad(f, x)
    assert not g.requires_grad
    assert_close(g, 2 * x.detach(), rtol=1e-8, atol=1e-8)
    for value in 1e6, 1e-6, 0.0:
        x = torch.tensor([value], dtype=torch.float64)
        assert_close(numerical_grad(f, x), 2 * x, rtol=1e-6, atol=1e-8)
    assert_close(numerical_grad(lambda x: float(x) ** 3, torch.tensor(2.0, dtype=torch.float64)), torch.tensor(12.0, dtype=torch.float64))
    assert numerical_grad(f, torch.zeros(0, 2)).shape == (0, 2)


def test_numerical_grad_gives_f_a_copy():
    x = rand(3)
    assert_close(numerical_grad(lambda x: x.mul_(2).sum(), x), torch.full((3,), 2.0, dtype=torch.float64))
    assert torch.equal(x, rand(3))


def test_numerical_grad_refuses():
    for wrong in torch.tensor([1, 2]), torch.tensor([True]), [1.0], 1.0, torch.zeros(2, dtype=torch.complex64):
        with pytest.raises(TypeError): numerical_grad(lambda x: 0.0, wrong)
    with pytest.raises(ValueError, match="single number"): numerical_grad(lambda x: x, torch.ones(2))
    for eps in 0, -1e-3, math.nan:
        with pytest.raises(ValueError, match="positive"): numerical_grad(torch.sum, torch.ones(2), eps=eps)
    with pytest.raises(ValueError, match="lost in rounding"): numerical_grad(torch.sum, torch.ones(2), eps=1e-12)
    assert_close(numerical_grad(torch.sum, torch.ones(2), eps=1e-2), torch.ones(2), rtol=1e-4, atol=1e-4)


# --- FunctionPair

def test_function_pair_goes_back_last_in_first_out():
    f = FunctionPair(tanh, tanh_grad)
    a, b = rand(3), rand(3, seed=1)
    outs = f(a), f(b)
    outs[1].g = torch.ones_like(b)
    f.backward()
    assert not hasattr(a, "g")
    same(b.g, 1 - b.tanh() ** 2)
    with pytest.raises(RuntimeError, match="out.g is not set"): f.backward()  # and the call is still there
    outs[0].g = torch.ones_like(a)
    f.backward()
    same(a.g, 1 - a.tanh() ** 2)
    with pytest.raises(RuntimeError, match="without a call"): f.backward()
    assert f.calls == []


def test_function_pair_of_a_loss():
    f = FunctionPair(cross_entropy, cross_entropy_grad, loss=True)
    x, y = rand(4, 3), torch.tensor([0, 1, 2, 0])
    out = f(x, y)
    f.backward()
    same(out, F.cross_entropy(x, y))
    same(x.g, theirs(lambda x: F.cross_entropy(x, y), x)[0])
    assert "cross_entropy_grad" in repr(f)


def test_a_whole_network():
    x, y = rand(8, 5), torch.arange(8) % 3
    w1, b1, w2, b2 = rand(6, 5, seed=1), rand(6, seed=2), rand(3, 6, seed=3), rand(3, seed=4)
    l1 = linear(x, w1, b1); h = relu(l1); z = linear(h, w2, b2)
    cross_entropy_grad(z, y); linear_grad(h, z, w2, b2); relu_grad(l1, h); linear_grad(x, l1, w1, b1)
    want = theirs(lambda x, w1, b1, w2, b2: F.cross_entropy(F.linear(F.linear(x, w1, b1).relu(), w2, b2), y), x, w1, b1, w2, b2)
    for t, g in zip((x, w1, b1, w2, b2), want): same(t.g, g)
