"""fromfound.forward against torch.nn.functional: values, slopes, shapes that are refused, inputs left as they were."""
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fromfound import forward as ff

few = settings(max_examples=60, deadline=None)
dtypes = st.sampled_from([torch.float32, torch.float64])
floats = st.one_of(st.sampled_from([0.0, -0.0, 1e-30, -1e-8, 1.0, -20.0, 50.0, 88.5, -89.0, 104.0, -746.0, 1e4, -1e4]),
                   st.floats(-6, 6, width=32))
ELEMENTWISE = {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
OVER_DIM = {"logsumexp": torch.logsumexp, "softmax": F.softmax, "log_softmax": F.log_softmax}


@st.composite
def tensors(draw, min_dims=0, min_side=0):
    shape = draw(st.lists(st.integers(min_side, 4), min_size=min_dims, max_size=4))
    n = torch.Size(shape).numel()
    t = torch.tensor(draw(st.lists(floats, min_size=n, max_size=n)), dtype=draw(dtypes)).reshape(shape)
    return t.transpose(0, -1) if t.ndim > 1 and draw(st.booleans()) else t


def slope(f, x, *rest):
    "The gradient at x under a random incoming gradient."
    x = x.detach().clone().requires_grad_()
    out = f(x, *rest)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    return torch.autograd.grad(out, x, g)[0]


def unharmed(f, *args):
    copies = [a.clone() for a in args]
    out = f(*args)
    assert all(torch.equal(a, c) for a, c in zip(args, copies))
    return out


@pytest.mark.parametrize("name", ELEMENTWISE)
@few
@given(x=tensors())
def test_activations(name, x):
    ours, theirs = getattr(ff, name), ELEMENTWISE[name]
    assert_close(unharmed(ours, x), theirs(x))
    assert_close(slope(ours, x), slope(theirs, x))


@pytest.mark.parametrize("name", OVER_DIM)
@few
@given(x=tensors(min_dims=1, min_side=1), data=st.data())
def test_over_a_dimension(name, x, data):
    ours, theirs, dim = getattr(ff, name), OVER_DIM[name], data.draw(st.integers(-x.ndim, x.ndim - 1))
    assert_close(unharmed(lambda x: ours(x, dim), x), theirs(x, dim))
    exact = slope(theirs, x.double(), dim)  # in float32, torch's own slope of logsumexp is rounded far from 0
    assert_close(slope(ours, x, dim), exact.to(x.dtype), **(dict(rtol=1e-4, atol=1e-5) if x.dtype == torch.float32 else {}))
    if name == "logsumexp": assert_close(ours(x, dim, keepdim=True), torch.logsumexp(x, dim, keepdim=True))


@few
@given(batch=st.lists(st.integers(0, 3), max_size=3), n_in=st.integers(1, 5), n_out=st.integers(1, 5), bias=st.booleans())
def test_linear(batch, n_in, n_out, bias):
    args = [torch.randn(*batch, n_in), torch.randn(n_out, n_in), *([torch.randn(n_out)] if bias else [])]
    assert_close(unharmed(ff.linear, *args), F.linear(*args))


@few
@given(shape=st.lists(st.integers(1, 4), max_size=4), dtype=dtypes)
def test_mse_loss(shape, dtype):
    a, b = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    assert_close(unharmed(ff.mse_loss, a, b), F.mse_loss(a, b))
    assert_close(slope(ff.mse_loss, a, b), slope(F.mse_loss, a, b))


@few
@given(n=st.integers(1, 6), classes=st.integers(1, 6), scale=st.sampled_from([1, 30, 1000]), dtype=dtypes)
def test_cross_entropy_and_accuracy(n, classes, scale, dtype):
    logits, labels = scale * torch.randn(n, classes, dtype=dtype), torch.randint(classes, (n,))
    assert_close(unharmed(ff.cross_entropy, logits, labels), F.cross_entropy(logits, labels))
    assert_close(slope(ff.cross_entropy, logits, labels), slope(F.cross_entropy, logits, labels))
    assert ff.accuracy(logits, labels) == (logits.argmax(1) == labels).float().mean()


@pytest.mark.parametrize("f, shapes, message", [
    (ff.linear, [(2, 3), (3, 4)], "input is (2, 3), weight is (3, 4): their last sizes must agree; did you mean weight.T?"),
    (ff.linear, [(2, 3), (5, 4)], "input is (2, 3), weight is (5, 4): their last sizes must agree"),
    (ff.linear, [(2, 3), (5, 3), (1,)], "bias is (1,), weight is (5, 3): bias needs one number for each row of weight"),
    (ff.mse_loss, [(5,), (5, 1)], "input is (5,), but target is (5, 1); did you mean target.squeeze(-1)?"),
    (ff.mse_loss, [(5, 1), (5,)], "input is (5, 1), but target is (5,); did you mean input.squeeze(-1)?"),
    (ff.mse_loss, [(5, 2), (2,)], "input is (5, 2), but target is (2,)"),
    (ff.mse_loss, [(0, 2), (0, 2)], "input and target are empty, and there is no mean of nothing"),
])
def test_shapes_that_would_pass_silently(f, shapes, message):
    with pytest.raises(ValueError, match=re.escape(message) + "$"): f(*map(torch.ones, shapes))


@pytest.mark.parametrize("f", [ff.cross_entropy, ff.accuracy])
@pytest.mark.parametrize("shape, labels, message", [
    ((3, 4), [0, 1, 4], "labels must be from 0 to 3, but they go from 0 to 4"),
    ((3, 4), [0, -1, 3], "labels must be from 0 to 3, but they go from -1 to 3"),
    ((3, 4), [0, 1], "input is (3, 4), target is (2,), not (N, C) and (N,)"),
    ((3, 4), [[0], [1], [2]], "not (N, C) and (N,); did you mean target.squeeze(-1)?"),
    ((4,), 2, "input is (4,), target is (), not (N, C) and (N,)"),
    ((2, 3, 4), [[0, 1], [2, 3]], "not (N, C) and (N,)"),
    ((0, 4), [], "input and target are empty"),
])
def test_labels_that_do_not_fit(f, shape, labels, message):
    with pytest.raises(ValueError, match=re.escape(message)): f(torch.zeros(shape), torch.tensor(labels, dtype=torch.int64))


@pytest.mark.parametrize("name, theirs", [("linear", F.linear), ("mse_loss", F.mse_loss), ("cross_entropy", F.cross_entropy),
                                          ("softmax", F.softmax), ("log_softmax", F.log_softmax), ("relu", F.relu)])
def test_arguments_are_called_as_in_torch(name, theirs):
    ours = list(inspect.signature(getattr(ff, name)).parameters)
    try: assert set(ours) <= set(inspect.signature(theirs).parameters)
    except ValueError: assert ours == ["input", "weight", "bias"]  # F.linear is built in and has no signature
