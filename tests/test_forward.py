"""fromfound.forward against torch.nn.functional: values, slopes, dtypes, devices, errors, and inputs left as they were."""
import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from fromfound import forward as ff

inf, nan = math.inf, math.nan
fast = settings(max_examples=60, deadline=None)
dtypes = st.sampled_from([torch.float32, torch.float64])
halves = [torch.float16, torch.bfloat16]
SPECIAL = [0., -0., 1e-30, -1e-8, 1., -1., 3., -20., 50., 88.5, -88.5, 89., -89., 104., -104., 710., -746., 1e4, -1e4,
           1e30, -1e30, inf, -inf, nan]
numbers = st.one_of(st.sampled_from(SPECIAL), st.floats(-6, 6, width=32), st.floats(width=32))
ELEMENTWISE = {"relu": (ff.relu, torch.relu), "sigmoid": (ff.sigmoid, torch.sigmoid), "tanh": (ff.tanh, torch.tanh)}
OVER_DIM = {"logsumexp": (ff.logsumexp, torch.logsumexp), "softmax": (ff.softmax, F.softmax),
            "log_softmax": (ff.log_softmax, F.log_softmax)}


@st.composite
def tensors(draw, elements=numbers, min_dims=0, max_dims=4, min_side=0, dtype=None):
    "A tensor of any layout: contiguous, transposed, every second element, or expanded."
    shape = draw(st.lists(st.integers(min_side, 4), min_size=min_dims, max_size=max_dims))
    dtype = dtype or draw(dtypes)
    layout = draw(st.sampled_from(["plain", "transposed", "strided", "expanded"]))
    if layout == "strided": shape = shape[:-1] + [2 * n for n in shape[-1:]]
    n = math.prod(shape)
    t = torch.tensor(draw(st.lists(elements, min_size=n, max_size=n)), dtype=dtype).reshape(shape)
    if layout == "transposed" and t.dim() > 1: t = t.transpose(0, -1)
    if layout == "strided" and t.dim(): t = t[..., ::2]
    if layout == "expanded" and t.dim() and t.shape[0]: t = t[:1].expand_as(t)
    return t


def same(t, copy):
    return t.dtype == copy.dtype and t.shape == copy.shape and torch.equal(t.nan_to_num(7., 8., 9.), copy.nan_to_num(7., 8., 9.))


def unharmed(f, *args):
    "Call f and make sure that no argument changes, whether it returns or raises, and that it returns none of them."
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    try:
        out = f(*args)
        assert all(out is not a for a in args)
        return out
    finally:
        for a, c in zip(args, copies):
            if isinstance(a, torch.Tensor): assert same(a, c) and not a.requires_grad and a.grad is None


def slope(f, x, *rest):
    "The slope of f at x under a random incoming gradient, the same one for float32 and float64."
    x = x.detach().clone().requires_grad_()
    out = f(x, *rest)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    return torch.autograd.grad(out, x, g)[0]


# ---- activation functions

@pytest.mark.parametrize("name", ELEMENTWISE)
@fast
@given(x=tensors())
def test_elementwise(name, x):
    ours, theirs = ELEMENTWISE[name]
    assert_close(unharmed(ours, x), theirs(x), equal_nan=True)
    assert_close(slope(ours, x), slope(theirs, x), equal_nan=True)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_smooth_slopes(name):
    ours, theirs = ELEMENTWISE[name]
    x = torch.tensor([0., -0., 1e-3, -1e-3, .7, -2., 30., -30.], dtype=torch.float64, requires_grad=True)
    if name == "relu": x = x[2:].detach().requires_grad_()  # a corner has no slope to check
    assert gradcheck(ours, x, eps=1e-7, atol=1e-6) and gradgradcheck(ours, x, eps=1e-7, atol=1e-6)
    assert_close(torch.func.vmap(torch.func.grad(ours))(x.detach()), torch.func.vmap(torch.func.grad(theirs))(x.detach()))


def test_elementwise_relative_error():
    "Not only close: every digit counts, where PyTorch's tolerance would let tiny results pass."
    x = torch.cat([torch.logspace(-30, 1.9, 2000), -torch.logspace(-30, 1.9, 2000)])
    assert_close(ff.tanh(x), torch.tanh(x.double()).float(), rtol=4e-7, atol=0)
    assert_close(ff.sigmoid(x), torch.sigmoid(x.double()).float(), rtol=4e-7, atol=0)


# ---- softmax and its kin

@pytest.mark.parametrize("name", OVER_DIM)
@fast
@given(x=tensors(), data=st.data())
def test_over_dim(name, x, data):
    ours, theirs = OVER_DIM[name]
    dim = data.draw(st.integers(-max(x.dim(), 1), max(x.dim(), 1) - 1))
    assert_close(unharmed(ours, x, dim), theirs(x, dim), equal_nan=True)
    if name == "logsumexp":
        assert_close(ours(x, dim, True), theirs(x, dim, True), equal_nan=True)
        x = torch.where(x.abs() > 1e3, x.sign() * inf, x)  # torch's slope is exp(x - out), where the rounding of out shows:
        want = slope(theirs, x.double(), dim).to(x.dtype)  # in float32 at 710 already, and at 1e8 it no longer adds up to 1
    else: want = slope(theirs, x, dim)
    assert_close(slope(ours, x, dim), want, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OVER_DIM)
def test_over_dim_specials(name, dtype):
    "Every pair of special values."
    ours, theirs = OVER_DIM[name]
    x = torch.tensor(list(itertools.product(SPECIAL, repeat=2)), dtype=dtype)
    assert_close(ours(x, 1), theirs(x, 1), equal_nan=True)
    x = torch.tensor(list(itertools.product([v for v in SPECIAL if not 1e3 < abs(v) < inf], repeat=2)), dtype=dtype)
    assert_close(slope(ours, x, 1), slope(theirs, x.double(), 1).to(dtype), equal_nan=True)


def test_logsumexp_slope_is_softmax():
    x = torch.tensor([1e8, 1e8, -inf])
    assert_close(torch.func.grad(lambda t: ff.logsumexp(t, 0))(x), torch.tensor([.5, .5, 0.]))


@pytest.mark.parametrize("dim", [(0, 2), [1, -1], (0, 1, 2), (1,)])
@pytest.mark.parametrize("keepdim", [False, True])
def test_logsumexp_many_dims(dim, keepdim):
    x = 100 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert_close(ff.logsumexp(x, dim, keepdim=keepdim), torch.logsumexp(x, dim, keepdim=keepdim))


@pytest.mark.parametrize("dim", [(), []])
def test_logsumexp_no_dim(dim):
    with pytest.raises(ValueError, match="logsumexp: dim is empty"): ff.logsumexp(torch.zeros(2, 3), dim)


@pytest.mark.parametrize("name", OVER_DIM)
def test_over_dim_slopes(name):
    ours, theirs = OVER_DIM[name]
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for dim in (0, 1): assert gradcheck(ours, (x, dim)) and gradgradcheck(ours, (x, dim))
    x = x.detach()
    assert_close(torch.func.vmap(lambda r: ours(r, 0))(x), theirs(x, 1))
    assert_close(torch.func.jacrev(lambda r: ours(r, 0))(x[0]), torch.func.jacrev(lambda r: theirs(r, 0))(x[0]))
    assert_close(torch.func.jacfwd(lambda r: ours(r, 0))(x[0]), torch.func.jacrev(lambda r: theirs(r, 0))(x[0]))


# ---- linear and the network

@fast
@given(shape=st.lists(st.integers(0, 4), max_size=3), n_in=st.integers(0, 5), n_out=st.integers(0, 5), dtype=dtypes,
       bias=st.booleans(), turned=st.booleans(), seed=st.integers(0, 99))
def test_linear(shape, n_in, n_out, dtype, bias, turned, seed):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, n_in, dtype=dtype, generator=gen)
    w = torch.randn(n_in, n_out, dtype=dtype, generator=gen).T if turned else torch.randn(n_out, n_in, dtype=dtype, generator=gen)
    b = torch.randn(n_out, dtype=dtype, generator=gen) if bias else None
    assert_close(unharmed(ff.linear, x, w, b), F.linear(x, w, b))
    leaves = [t.clone().requires_grad_() for t in (x, w, b) if t is not None]
    g = torch.randn(*shape, n_out, dtype=dtype, generator=gen)
    for a, c in zip(torch.autograd.grad(ff.linear(*leaves), leaves, g), torch.autograd.grad(F.linear(*leaves), leaves, g)): assert_close(a, c)


@pytest.mark.parametrize("x, w, b, error, words", [
    ((2, 3), (3, 4), None, ValueError, ["(2, 3)", "(3, 4)"]),
    ((2, 3), (3, 4), (4,), ValueError, ["did you mean weight.T?"]),
    ((2, 5), (4, 3), (4,), ValueError, ["(2, 5)", "(4, 3)"]),
    ((), (4, 3), None, ValueError, ["()", "(4, 3)"]),
    ((2, 3), (3,), None, ValueError, ["(3,)", "out_features"]),
    ((4, 3), (4, 3), (4, 1), ValueError, ["(4, 1)", "(4, 3)"]),
    ((2, 3), (4, 3), (1,), ValueError, ["(1,)", "(4, 3)"]),
    ((2, 3), (4, 3), (), ValueError, ["()"]),
])
def test_linear_shapes_refused(x, w, b, error, words):
    args = [None if s is None else torch.ones(s) for s in (x, w, b)]
    with pytest.raises(error) as e: unharmed(ff.linear, *args)
    for word in words + ["linear:"]: assert word in str(e.value)


@pytest.mark.parametrize("bad", [[[1., 2., 3.]], None, 3., torch.ones(2, 3).numpy(), torch.ones(2, 3, dtype=torch.int64),
                                 torch.ones(2, 3, dtype=torch.bool), torch.ones(4, 3, dtype=torch.float64)])
def test_linear_types_refused(bad):
    with pytest.raises(TypeError, match="linear: .*input"): ff.linear(bad, torch.ones(4, 3), torch.ones(4))
    with pytest.raises(TypeError, match="weight"): ff.linear(torch.ones(2, 3), bad, torch.ones(4))
    if bad is not None:
        with pytest.raises(TypeError, match="bias"):
            ff.linear(torch.ones(5, 3), torch.ones(4, 3), torch.ones(4).to(bad.dtype) if isinstance(bad, torch.Tensor) else bad)


def test_check_linear_names_its_caller_late():
    class Caller:
        def __str__(self): raise AssertionError("turned into text although nothing is wrong")
    ff.check_linear(Caller(), torch.ones(2, 3), torch.ones(4, 3), torch.ones(4))
    ff.check_same_shape(Caller(), torch.ones(2), torch.ones(2))
    assert ff.check_labels(Caller(), torch.ones(2, 3), torch.tensor([0, 2])) == 1


@pytest.mark.parametrize("sizes", [[3, 2], [64, 50, 10], [5, 4, 3, 2, 1]])
def test_mlp_is_sequential(sizes):
    params = ff.init_mlp(sizes, generator=torch.Generator().manual_seed(0))
    assert [tuple(w.shape) for w, _ in params] == list(zip(sizes[1:], sizes))
    assert all(b.shape == w.shape[:1] and not b.any() for w, b in params)
    net = torch.nn.Sequential(*(m for a, b in zip(sizes, sizes[1:]) for m in (torch.nn.Linear(a, b), torch.nn.ReLU())))[:-1]
    net.load_state_dict({f"{2 * i}.{n}": t for i, pair in enumerate(params) for n, t in zip(("weight", "bias"), pair)})
    for shape in ((7,), (), (0,), (2, 3)):
        x = torch.randn(*shape, sizes[0])
        assert_close(unharmed(ff.mlp, x, params), net(x).detach())


def test_init_mlp_scale():
    params = ff.init_mlp([400, 500, 300, 200], generator=torch.Generator().manual_seed(0))
    for (w, _), std in zip(params, (math.sqrt(2 / 400), math.sqrt(2 / 500), 1 / math.sqrt(300))):
        assert abs(w.std().item() / std - 1) < .02 and abs(w.mean().item()) < .02 * std
    again = ff.init_mlp([400, 500, 300, 200], generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for p, q in zip(params, again) for a, b in zip(p, q))


@pytest.mark.parametrize("sizes", [[], [3], [3, 0], [3, -1, 2]])
def test_init_mlp_refuses(sizes):
    with pytest.raises(ValueError, match="init_mlp"): ff.init_mlp(sizes)


# ---- mean squared error

@fast
@given(x=tensors(min_side=1), data=st.data())
def test_mse(x, data):
    target = torch.tensor(data.draw(st.lists(numbers, min_size=x.numel(), max_size=x.numel())), dtype=x.dtype).reshape(x.shape)
    assert_close(unharmed(ff.mse_loss, x, target), F.mse_loss(x, target), equal_nan=True)
    assert_close(slope(ff.mse_loss, x, target), slope(F.mse_loss, x, target), equal_nan=True)


@pytest.mark.parametrize("a, b, hint", [
    ((200,), (200, 1), "target.squeeze(-1)"), ((200, 1), (200,), "input.squeeze(-1)"), ((), (1,), "target.squeeze(-1)"), ((1,), (), "input.squeeze(-1)"),
    ((5, 3), (3,), ""), ((5, 3), (1, 3), ""), ((5, 3), (3, 5), ""), ((2,), (3,), ""), ((5, 0), (5, 1), ""),
])
def test_mse_shapes_refused(a, b, hint):
    with pytest.raises(ValueError) as e: unharmed(ff.mse_loss, torch.zeros(a), torch.zeros(b))
    for word in (str(a), str(b), hint, "mse_loss"): assert word in str(e.value)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_mse_empty_refused(shape):
    with pytest.raises(ValueError, match="empty"): ff.mse_loss(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize("bad", [[0., 0.], 0., None, torch.zeros(2).numpy(), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.float64)])
def test_mse_types_refused(bad):
    with pytest.raises(TypeError, match="mse_loss"): ff.mse_loss(torch.zeros(2), bad)
    with pytest.raises(TypeError, match="mse_loss"): ff.mse_loss(bad, torch.zeros(2))


# ---- cross-entropy and accuracy

@st.composite
def logits_and_labels(draw, elements=numbers):
    n_classes = draw(st.integers(1, 5))
    batch = draw(st.lists(st.integers(1, 3), max_size=3))
    shape = batch[:1] + [n_classes] + batch[1:]
    n = math.prod(shape)
    logits = torch.tensor(draw(st.lists(elements, min_size=n, max_size=n)), dtype=draw(dtypes)).reshape(shape)
    m = math.prod(batch)
    labels = draw(st.lists(st.integers(0, n_classes - 1) | st.just(-100), min_size=m, max_size=m))
    if all(v == -100 for v in labels): labels[0] = n_classes - 1
    return logits, torch.tensor(labels).reshape(batch)


@fast
@given(pair=logits_and_labels())
def test_cross_entropy(pair):
    logits, labels = pair
    assert_close(unharmed(ff.cross_entropy, logits, labels), F.cross_entropy(logits, labels), equal_nan=True)
    assert_close(slope(ff.cross_entropy, logits, labels), slope(F.cross_entropy, logits, labels), equal_nan=True)


@fast
@given(pair=logits_and_labels(st.integers(-50, 50).map(float)))
def test_accuracy(pair):
    logits, labels = pair
    got = unharmed(ff.accuracy, logits, labels)
    kept = labels != -100
    want = (logits.argmax(0 if logits.dim() == 1 else 1) == labels)[kept].float().mean()
    assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("f", [ff.cross_entropy, ff.accuracy])
def test_label_dtypes(f, dtype):
    logits = torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 100, 120, 3])
    assert_close(f(logits, labels.to(dtype)), f(logits, labels))
    if dtype != torch.uint8:
        labels[2] = -100
        assert_close(f(logits, labels.to(dtype)), f(logits, labels))
    else:  # 156 is -100 modulo 256, and a label like any other
        assert_close(f(logits, torch.full((6,), 156, dtype=dtype)), f(logits, torch.full((6,), 156)))


def test_cross_entropy_slopes():
    gen = torch.Generator().manual_seed(0)
    for shape, labels in (((4, 3), [0, 2, -100, 1]), ((3,), 2), ((2, 3, 2), [[0, -100], [2, 1]])):
        x = torch.randn(shape, dtype=torch.float64, generator=gen).requires_grad_()
        assert gradcheck(lambda t: ff.cross_entropy(t, torch.tensor(labels)), x)
        assert gradgradcheck(lambda t: ff.cross_entropy(t, torch.tensor(labels)), x)


@pytest.mark.parametrize("f", [ff.cross_entropy, ff.accuracy])
@pytest.mark.parametrize("x, y, error, words", [
    ((2, 3), torch.tensor([0, 3]), ValueError, ["0 to 2", "0 to 3"]),
    ((2, 3), torch.tensor([0, -1]), ValueError, ["-1"]),
    ((2, 3), torch.tensor([-100, -99]), ValueError, ["-99"]),
    ((2, 3), torch.tensor([-100, 3]), ValueError, ["3"]),
    ((2, 3), torch.tensor([-100, -100]), ValueError, ["every label is -100"]),
    ((2, 0), torch.tensor([0, 0]), ValueError, ["labels"]),
    ((0, 3), torch.zeros(0, dtype=torch.int64), ValueError, ["(0,)", "no mean of nothing"]),
    ((2, 3, 0), torch.zeros(2, 0, dtype=torch.int64), ValueError, ["no mean of nothing"]),
    ((2, 3), torch.zeros(3, dtype=torch.int64), ValueError, ["(2, 3)", "(3,)"]),
    ((2, 3), torch.zeros(2, 1, dtype=torch.int64), ValueError, ["(2, 1)", "did you mean target.squeeze(-1)?"]),
    ((3,), torch.zeros(1, dtype=torch.int64), ValueError, ["(3,)", "(1,)"]),
    ((), torch.tensor(0), ValueError, ["()"]),
    ((2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), ValueError, ["(2, 3, 4)", "(2, 3)"]),
    ((2, 3), torch.tensor([0., 1.]), TypeError, ["float32", "target.long()"]),
    ((2, 3), torch.tensor([True, False]), TypeError, ["bool"]),
    ((2, 3), torch.tensor([0j, 1]), TypeError, ["complex"]),
    ((2, 3), [0, 1], TypeError, ["list"]),
    ((2, 3), None, TypeError, ["None"]),
    ((2, 3), torch.full((2, 3), 1 / 3), NotImplementedError, ["class probabilities"]),
])
def test_labels_refused(f, x, y, error, words):
    with pytest.raises(error) as e: unharmed(f, torch.zeros(x), y)
    for word in words + [f.__name__]: assert word in str(e.value)


@pytest.mark.parametrize("f", [ff.cross_entropy, ff.accuracy])
@pytest.mark.parametrize("x", [[[0., 1.]], torch.zeros(1, 2).numpy(), torch.zeros(1, 2, dtype=torch.int64)])
def test_logits_refused(f, x):
    with pytest.raises(TypeError, match=f.__name__): f(x, torch.tensor([0]))


# ---- all of them

X, T, L = (2, 3), (2, 3), torch.tensor([2, 0])
CALLS = {
    "linear": (lambda x: ff.linear(x, x, x[:, 0]), lambda x: F.linear(x, x, x[:, 0])),
    "relu": ELEMENTWISE["relu"], "sigmoid": ELEMENTWISE["sigmoid"], "tanh": ELEMENTWISE["tanh"],
    "logsumexp": (lambda x: ff.logsumexp(x, 1), lambda x: torch.logsumexp(x, 1)),
    "softmax": (lambda x: ff.softmax(x, 1), lambda x: F.softmax(x, 1)),
    "log_softmax": (lambda x: ff.log_softmax(x, 1), lambda x: F.log_softmax(x, 1)),
    "mse_loss": (lambda x: ff.mse_loss(x, x.flip(0)), lambda x: F.mse_loss(x, x.flip(0))),
    "cross_entropy": (lambda x: ff.cross_entropy(x, L.to(x.device)), lambda x: F.cross_entropy(x, L.to(x.device))),
}


@pytest.mark.parametrize("dtype", halves)
@pytest.mark.parametrize("name", CALLS)
def test_half_precision(name, dtype):
    "The dtype is kept, and the number is the exact one, rounded (torch's own is a little further off for log_softmax)."
    ours, theirs = CALLS[name]
    x = (3 * torch.randn(X, generator=torch.Generator().manual_seed(0))).to(dtype)
    got, eps = ours(x), torch.finfo(dtype).eps
    assert got.dtype == dtype
    exact = theirs(x.double())
    rtol = 4 * eps if name in ("linear", "mse_loss") else .51 * eps
    assert_close(got.double(), exact, rtol=rtol, atol=4 * eps if name == "linear" else 1e-7)
    assert ff.accuracy(x, L).dtype == torch.float32


@pytest.mark.parametrize("name", CALLS)
def test_devices(name):
    ours, theirs = CALLS[name]
    x = torch.empty(X, device="meta")
    assert ours(x).device == theirs(x).device == x.device and ours(x).shape == theirs(x).shape
    if torch.cuda.is_available():
        x = torch.randn(X, device="cuda")
        assert_close(ours(x), theirs(x))


def test_meta_accuracy():
    got = ff.accuracy(torch.empty(X, device="meta"), torch.empty(2, dtype=torch.int64, device="meta"))
    assert got.device.type == "meta" and got.shape == () and got.dtype == torch.float32
    with pytest.raises(ValueError, match="empty"):
        ff.cross_entropy(torch.empty(0, 3, device="meta"), torch.empty(0, dtype=torch.int64, device="meta"))


def test_default_dtype_does_not_leak():
    torch.set_default_dtype(torch.float64)
    try:
        x = torch.randn(X, dtype=torch.float32)
        for ours, _ in CALLS.values(): assert ours(x).dtype == torch.float32
        assert ff.accuracy(x, L).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", [*ELEMENTWISE, *OVER_DIM])
@pytest.mark.parametrize("bad", [1., [1., 2.], None, torch.ones(3).numpy(), torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.complex64)])
def test_types_refused(name, bad):
    args = (bad,) if name in ELEMENTWISE else (bad, 0)
    with pytest.raises(TypeError, match=f"{name}: input"): getattr(ff, name)(*args)


@pytest.mark.parametrize("name", OVER_DIM)
def test_dims_refused(name):
    f, x = getattr(ff, name), torch.zeros(2, 3)
    for dim in (None, "1", 1., True):
        with pytest.raises(TypeError, match=f"{name}: dim is"): unharmed(f, x, dim)
    for dim in (2, -3):
        for t in (x, x[:0]):
            with pytest.raises(IndexError): unharmed(f, t, dim)
    if name != "logsumexp":
        with pytest.raises(TypeError, match="dim is"): f(x, (0, 1))


def test_arguments_are_torchs():
    "Names, order and defaults are the first ones of torch's functions; dim of softmax has no default, as its None is deprecated."
    theirs = {n: getattr(F, n) for n in ("relu", "softmax", "log_softmax", "mse_loss", "cross_entropy")}
    for name, f in theirs.items():
        own, other = inspect.signature(getattr(ff, name)).parameters, inspect.signature(f).parameters
        assert list(own) == list(other)[:len(own)]
        for p in own: assert p == "dim" or own[p].default == other[p].default
    assert list(inspect.signature(ff.linear).parameters) == ["input", "weight", "bias"]
    assert str(inspect.signature(ff.logsumexp).parameters["keepdim"].default) == "False"
    with pytest.raises(TypeError): ff.cross_entropy(torch.zeros(2, 3), L, label_smoothing=.1)
    with pytest.raises(TypeError): ff.mse_loss(torch.zeros(2), torch.zeros(2), reduction="sum")


def test_autograd_is_never_switched_off():
    x = torch.randn(2, 3, requires_grad=True)
    for ours, _ in CALLS.values(): assert ours(x).requires_grad
    with torch.no_grad():
        for ours, _ in CALLS.values(): assert not ours(x).requires_grad
