"""fromfound.engine against torch: values, first and second derivatives; random expressions; deep graphs, second passes, memory."""
import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fromfound import engine
from fromfound.engine import Tensor, cat, grad, no_grad, stack, where

few = settings(max_examples=150, deadline=None)
exact = dict(rtol=1e-9, atol=1e-9)


def randn(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 17 * len(shape)), dtype=torch.float64)
def positive(*shape): return randn(*shape).abs() + 0.1


def agrees(f, *values):
    "Value, gradients and gradients of gradients, under random incoming gradients, against torch's; the inputs are left as they were."
    before = [v.clone() for v in values]
    ours, theirs = [Tensor(v, True) for v in values], [v.clone().requires_grad_() for v in values]
    out, want = f(*ours), f(*theirs)
    assert_close(out.data, want.detach(), **exact)
    g = randn(*out.shape, seed=1)
    first, first_want = grad(out, ours, g, create_graph=True), torch.autograd.grad(want, theirs, g, create_graph=True)
    for a, b in zip(first, first_want): assert_close(a.data, b.detach(), **exact)
    f(*ours).backward(g)
    for x, b in zip(ours, first_want): assert_close(x.grad.data, b.detach(), **exact)
    assert all(torch.equal(v, b) for v, b in zip(values, before))
    if not any(b.requires_grad for b in first_want): return  # linear: torch has no second derivative, and ours is 0
    weights = [randn(*b.shape, seed=2) for b in first_want]
    total = sum(((a * Tensor(k)).sum() for a, k in zip(first[1:], weights[1:])), (first[0] * Tensor(weights[0])).sum())
    second_want = torch.autograd.grad(sum((b * k).sum() for b, k in zip(first_want, weights)), theirs, allow_unused=True)
    second = grad(total, ours) if total.requires_grad else [None] * len(ours)
    for a, b, v in zip(second, second_want, values):
        assert_close(torch.zeros_like(v) if a is None else a.data, torch.zeros_like(v) if b is None else b, **exact)


BROADCAST = [((3, 4), (3, 4)), ((3, 1), (4,)), ((2, 1, 3), (4, 1)), ((), (2, 3)), ((2, 3), ()), ((), ()), ((0, 3), (3,)), ((1,), (0,)), ((1, 1), (5, 1, 1))]
OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b, "**": lambda a, b: a**b}


@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_arithmetic_broadcasts(name, shapes):
    agrees(OPERATORS[name], positive(*shapes[0]), positive(*shapes[1]))
    agrees(OPERATORS[name], positive(*shapes[0]), randn(*shapes[1]) if name != "/" else positive(*shapes[1]))


@pytest.mark.parametrize("f", [lambda a: a + 2, lambda a: 2 - a * a, lambda a: 3 * a * a, lambda a: 1 / a, lambda a: a / 4 * a, lambda a: -a * a, lambda a: 2.0**a,
                               *(lambda a, n=n: a**n for n in (0, 1, 2, 3, -1, 0.5, -1.5))])
@pytest.mark.parametrize("shape", [(3,), (), (0,), (2, 3)], ids=str)
def test_arithmetic_with_numbers(f, shape): agrees(f, positive(*shape))


def test_powers_at_zero():
    for n in (1, 2, 3): agrees(lambda a: a**n, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "sigmoid", "relu"])
@pytest.mark.parametrize("shape", [(5,), (), (0, 2), (2, 3)], ids=str)
def test_functions(name, shape):
    agrees(lambda a: getattr(a, name)() * a, positive(*shape) if name == "log" else randn(*shape))


def test_relu_at_zero(): agrees(lambda a: a.relu() * 2, torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("shapes", [((2, 3), (3, 4)), ((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 2)), ((5, 2, 3), (5, 3, 4)), ((5, 1, 2, 3), (4, 3, 2)),
                                    ((3,), (4, 3, 2)), ((4, 2, 3), (3,)), ((0, 3), (3, 2)), ((2, 0), (0, 3))], ids=str)
def test_matmul(shapes): agrees(lambda a, b: a @ b, randn(*shapes[0]), randn(*shapes[1], seed=5))


DIMS = [((2, 3), None), ((2, 3), 0), ((2, 3), -1), ((2, 3, 4), (0, 2)), ((), None), ((4,), 0), ((2, 1), 1)]


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("shape, dim", DIMS, ids=str)
def test_sum_and_mean(shape, dim, keepdim):
    options = {} if dim is None else dict(dim=dim, keepdim=keepdim)
    agrees(lambda a: a.sum(**options) * a.sum(), randn(*shape))
    agrees(lambda a: a.mean(**options) ** 2, randn(*shape))


def test_sums_over_nothing():
    agrees(lambda a: a.sum(), randn(0, 3))
    agrees(lambda a: a.sum(1) * 2, randn(0, 3))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("shape, dim", DIMS, ids=str)
def test_max(shape, dim, keepdim, ties):
    x = randn(*shape).round() if ties else randn(*shape)
    ours, theirs, dims = Tensor(x, True), x.clone().requires_grad_(), () if dim is None else dim
    out, want = ours.max(dim, keepdim and dim is not None), theirs.amax(dims, keepdim and dim is not None)
    assert_close(out.data, want.detach())
    g = randn(*want.shape, seed=1)
    out.backward(g)
    assert_close(ours.grad.data, torch.autograd.grad(want, theirs, g)[0], **exact)


@pytest.mark.parametrize("f", [lambda a: a.reshape(3, 2) @ a, lambda a: a.reshape(-1) * 2, lambda a: a.transpose(0, 1) @ a, lambda a: a.T @ a, lambda a: a.mT @ a,
                               lambda a: a.permute(1, 0) * a.T, lambda a: a.unsqueeze(1) * a, lambda a: a.unsqueeze(0).squeeze(0) * a,
                               lambda a: a.expand(4, 2, 3) * a, lambda a: a[:1].expand(2, 3) * a])
def test_shapes(f): agrees(f, randn(2, 3))


rows = torch.tensor([0, 0, 2])
INDICES = [1, -1, slice(None, None, 2), (slice(None), 0), (..., 1), (None, 1), rows, (rows, torch.tensor([1, 1, 0])), (slice(None), rows[:2]),
           torch.tensor([True, False, True]), (slice(1, 3), slice(0, 0))]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing(index): agrees(lambda a: a[index] * a[index] * 2, randn(3, 3))


def test_indexing_by_our_tensors(): assert_close(Tensor(randn(4))[Tensor([1, 2])].data, randn(4)[1:3])


def test_cat_stack_where():
    for dim in (0, 1, -1):
        ours, theirs = [Tensor(randn(2, 3, seed=i), True) for i in range(3)], [randn(2, 3, seed=i).requires_grad_() for i in range(3)]
        for f, g in ((cat, torch.cat), (stack, torch.stack)):
            out, want = f([x * x for x in ours], dim), g([x * x for x in theirs], dim)
            assert_close(out.data, want.detach())
            k = randn(*want.shape)
            for a, b in zip(grad(out, ours, k), torch.autograd.grad(want, theirs, k)): assert_close(a.data, b, **exact)
    a, b = randn(3, 1), randn(4)
    mask = randn(3, 4) > 0
    def choose(x, y): return where(mask, x * x, y) if isinstance(x, Tensor) else torch.where(mask, x * x, y)
    agrees(choose, a, b)
    x = Tensor(a, True)
    where(x > 0, x, 0.0).sum().backward()
    assert_close(x.grad.data, (a > 0).double())


def test_comparisons():
    a, b = randn(3, 1).round(), randn(4).round()
    for f in (lambda a, b: a < b, lambda a, b: a <= b, lambda a, b: a > b, lambda a, b: a >= b, lambda a, b: a == b, lambda a, b: a != b):
        assert torch.equal(f(Tensor(a, True), Tensor(b)).data, f(a, b)) and not f(Tensor(a, True), 0.0).requires_grad


@st.composite
def expressions(draw, depth=4):
    "A function of two tensors, (2, 3) and (3,), that torch and we can both compute."
    if depth == 0 or draw(st.booleans()) and depth < 3: return draw(st.sampled_from([lambda a, b: a, lambda a, b: b, lambda a, b: a * b]))
    kind = draw(st.sampled_from("+ - * tanh sigmoid relu exp mean keep square matmul index".split()))
    f = draw(expressions(depth - 1))
    if kind in "+-*":
        g, op = draw(expressions(depth - 1)), OPERATORS[kind]
        return lambda a, b: op(f(a, b), g(a, b))
    return {
        "tanh": lambda a, b: f(a, b).tanh(), "sigmoid": lambda a, b: f(a, b).sigmoid(), "relu": lambda a, b: (f(a, b) - 0.1).relu(),
        "exp": lambda a, b: (f(a, b).tanh()).exp(), "mean": lambda a, b: f(a, b) - f(a, b).mean(), "keep": lambda a, b: f(a, b) * f(a, b).sum(-1, keepdim=True),
        "square": lambda a, b: f(a, b) ** 2, "matmul": lambda a, b: (f(a, b) + a) @ (f(a, b) + a).mT @ a, "index": lambda a, b: f(a, b)[..., [2, 0, 0]]}[kind]


@few
@given(f=expressions(), seed=st.integers(0, 100))
def test_random_expressions(f, seed):
    agrees(lambda a, b: (f(a, b) + a * 0 + b * 0).sigmoid(), randn(2, 3, seed=seed), randn(3, seed=seed))


def test_a_deep_graph():
    x = y = Tensor(torch.tensor(1.0, dtype=torch.float64), True)
    for _ in range(50_000): y = y * 1.00001 + 0.0
    y.backward()
    assert x.grad.item() == pytest.approx(1.00001**50_000)


def test_wide_reuse_is_linear():
    "A value used twice in each of 200 steps: 2^200 paths, and 200 rules."
    x = y = Tensor(1.0, True)
    for _ in range(200): y = (y + y) * 0.5
    y.backward()
    assert x.grad.item() == 1


def test_a_second_backward_is_torchs():
    x = Tensor(2.0, True)
    h = x * x
    y = h * h
    y.backward(retain_graph=True)
    assert x.grad.item() == 32 and h.grad is None
    y.backward()
    assert x.grad.item() == 64 and h.grad is None
    with pytest.raises(RuntimeError, match="retain_graph=True"): y.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"): (h + 1).backward()  # what it shares with the first is gone
    assert x.grad.item() == 64


def test_changes_in_place_are_noticed():
    "As PyTorch does: the rules would read numbers that are no longer those of the forward pass."
    for change in (lambda x, h: x.data.add_(1), lambda x, h: h.data.mul_(2)):
        x = Tensor(torch.ones(3), True)
        h = x * x
        y = (h * h).sum()
        change(x, h)
        with pytest.raises(RuntimeError, match="changed in place"): y.backward()
    x = Tensor(torch.ones(3), True)
    for _ in range(3):  # an optimiser's step between two passes is fine
        x.grad = None
        (x * x).sum().backward()
        x.data -= 0.1 * x.grad.data


def test_meets_other_numbers():
    x = Tensor(torch.ones(2), True)
    assert isinstance(np.float64(2) * x, Tensor) and float(x.sum()) == 2.0 and not (x.sum() > 3)
    (x * torch.ones(2, dtype=torch.float64)).sum().backward()
    assert x.grad.dtype == torch.float32
    (g,) = grad((x * x).sum(), x)
    assert g.data.tolist() == [2, 2]
    base, power = torch.zeros(3, dtype=torch.float64), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    ours, theirs = [Tensor(t, True) for t in (base, power)], [t.clone().requires_grad_() for t in (base, power)]
    (ours[0] ** ours[1]).sum().backward()
    (theirs[0] ** theirs[1]).sum().backward()
    for a, b in zip(ours, theirs): assert_close(a.grad.data, b.grad)


def test_leaves_share_no_memory():
    a, b, g = Tensor(torch.ones(2), True), Tensor(torch.ones(2), True), torch.ones(2)
    (a + b).backward(g)
    assert len({a.grad.data.data_ptr(), b.grad.data.data_ptr(), g.data_ptr()}) == 3
    c = Tensor(torch.ones(3), True)
    c.sum().backward()
    c.grad.data[0] = 5
    assert c.grad.data.tolist() == [5, 1, 1]


def test_memory_is_freed_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        x = Tensor(torch.ones(3), True)
        out = (x.exp() * x).sum()
        inner = weakref.ref(out._record[1][0])
        del out
        assert inner() is None, "a result that is dropped takes its graph along"
        out = (x.exp() * x).sum()
        inner = weakref.ref(out._record[1][0])
        out.backward()
        assert inner() is None, "a backward pass frees the graph"
        (g,) = grad((x.exp() * x).sum(), [x], create_graph=True)
        inner = weakref.ref(g._record[1][0])
        del g
        assert inner() is None
    finally: gc.enable()


def test_what_is_recorded():
    x = Tensor(torch.ones(2), True)
    with no_grad(): assert not (x * 2).requires_grad
    assert (x * 2).requires_grad and not x.detach().requires_grad and not (Tensor(1.0) + 1).requires_grad
    with torch.enable_grad(): assert not (x * 2).data.requires_grad
    assert grad((x * 2).sum(), [x, Tensor(1.0, True)])[1] is None and x.grad is None
    leaf = torch.ones(2, requires_grad=True)
    assert not Tensor(leaf).data.requires_grad


@pytest.mark.parametrize("f, error, words", [
    (lambda x: x.backward(), RuntimeError, r"single number.*\(2,\)"), (lambda x: x.backward(torch.ones(3)), ValueError, r"\(3,\).*\(2,\)"),
    (lambda x: x.detach().sum().backward(), RuntimeError, "requires a gradient")])
def test_what_is_refused(f, error, words):
    x = Tensor(torch.ones(2), True)
    with pytest.raises(error, match=words): f(x * 2 if error is ValueError else x)
    assert x.grad is None


def test_dtypes_and_repr():
    x = Tensor(torch.ones(2, dtype=torch.float32), True)
    (x * x).sum().backward()
    assert x.grad.dtype == torch.float32 and (x * 2.0).dtype == torch.float32
    assert repr(x) == "tensor([1., 1.], requires_grad=True)" and len(x) == 2 and x.sum().item() == 2
    assert len({x, x}) == 1


def test_every_rule_is_used():
    "No line of the table is untested."
    names = {"add", "sub", "mul", "div", "neg", "power", "pow", "matmul", "exp", "log", "tanh", "sigmoid", "relu", "sum", "max", "reshape", "expand", "permute",
             "index", "put", "masked_fill", "where"}
    assert set(engine.RULES) == names
