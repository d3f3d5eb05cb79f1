"""fromfound.autograd_fn against torch: values, first and second gradients, transforms, what is kept, errors, modules."""
import copy
import gc
import itertools
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from fromfound import forward as ff
from fromfound import layers
from fromfound.autograd_fn import (CrossEntropyFunction, LinearFunction, LinearLayer, Module, MSELossFunction,
                                   ReLUFunction, SigmoidFunction)

inf, nan = float("inf"), float("nan")
FUNCTIONS = {LinearFunction: (F.linear, ff.linear), ReLUFunction: (F.relu, ff.relu), SigmoidFunction: (torch.sigmoid, ff.sigmoid),
             MSELossFunction: (F.mse_loss, ff.mse_loss), CrossEntropyFunction: (F.cross_entropy, ff.cross_entropy)}
close = lambda a, b: assert_close(a, b, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand(*shape, wants=False):
    return torch.randn(shape, dtype=torch.double).requires_grad_(wants)


def special(*values):
    return torch.tensor(values, dtype=torch.double)


edges = special(0., -0., nan, inf, -inf, 1., -1., 800., -800., 1e-300)
CASES = [
    *[(LinearFunction, (rand(*shape), rand(5, 3), rand(5))) for shape in [(3,), (4, 3), (2, 4, 3), (2, 2, 4, 3), (0, 3), (2, 0, 3), (1, 3)]],
    *[(LinearFunction, (rand(*shape), rand(5, 3))) for shape in [(3,), (4, 3), (2, 2, 4, 3), (0, 3)]],
    (LinearFunction, (rand(4, 3), rand(5, 3), None)), (LinearFunction, (rand(4, 0), rand(5, 0), rand(5))),
    (LinearFunction, (rand(4, 3), rand(0, 3), rand(0))), (LinearFunction, (rand(3, 4).T, rand(3, 5).T, rand(10)[::2])),
    (LinearFunction, (rand(2, 3, 4).transpose(1, 2), rand(5, 6)[:, ::2], rand(1).expand(5))),
    *[(f, (rand(*shape),)) for f in (ReLUFunction, SigmoidFunction) for shape in [(), (3,), (4, 3), (2, 4, 3), (2, 2, 4, 3), (0,), (3, 0)]],
    *[(f, (x,)) for f in (ReLUFunction, SigmoidFunction) for x in (edges, torch.zeros(3, dtype=torch.double), rand(4, 6).T[::2], rand(1, 4).expand(3, 4))],
    *[(MSELossFunction, (rand(*shape), rand(*shape))) for shape in [(), (3,), (4, 3), (2, 4, 3), (2, 2, 4, 3)]],
    (MSELossFunction, (rand(3, 4).T, rand(4, 6)[:, ::2])), (MSELossFunction, (special(1., nan, 0.), special(0., 1., 0.))),
    *[(CrossEntropyFunction, (3 * rand(*shape), y)) for shape, y in
      [((5,), torch.tensor(3)), ((4, 5), torch.tensor([0, 4, -100, 1])), ((1, 5), torch.tensor([2])), ((2, 5, 3), torch.randint(5, (2, 3))),
       ((2, 5, 3, 2), torch.randint(5, (2, 3, 2))), ((4, 1), torch.zeros(4, dtype=torch.long))]],
    (CrossEntropyFunction, (1e4 * rand(4, 5), torch.arange(4))), (CrossEntropyFunction, (rand(5, 4).T, torch.tensor([0, -100, -100, 1]))),
]
named = pytest.mark.parametrize("function, inputs", CASES, ids=[f"{f.__name__}-{i}" for i, (f, _) in enumerate(CASES)])


def floats(inputs):
    return [i for i, t in enumerate(inputs) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def leaves(inputs, wanted):
    "The inputs as fresh leaves in their own layout; those whose index is wanted require a gradient."
    return [t.detach().requires_grad_(i in wanted) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for i, t in enumerate(inputs)]


def two_gradients(f, inputs, wanted, g, weights):
    "Value, gradients for the incoming gradient g, and the gradients of a weighted sum of those."
    args = leaves(inputs, wanted)
    out = f(*args)
    g = g.clone().requires_grad_()
    wants = [args[i] for i in wanted]
    first = torch.autograd.grad(out, wants, g, create_graph=True)
    total = sum((a * w).sum() for a, w in zip(first, weights))
    second = torch.autograd.grad(total, [*wants, g], allow_unused=True) if total.requires_grad else [None] * (len(wants) + 1)
    return out, first, [torch.zeros_like(t) if s is None else s for s, t in zip(second, [*wants, g])]


@named
def test_values_and_gradients_are_torchs(function, inputs):
    "For every subset of inputs that wants a gradient: value, first and second derivatives, shape and dtype."
    theirs = FUNCTIONS[function][0]
    indices = floats(inputs)
    for wanted in itertools.chain.from_iterable(itertools.combinations(indices, n) for n in range(1, len(indices) + 1)):
        g = torch.randn_like(theirs(*inputs))
        weights = [torch.randn_like(inputs[i]) for i in wanted]
        before = [t.clone() if isinstance(t, torch.Tensor) else t for t in inputs]
        ours = two_gradients(function.apply, inputs, wanted, g, weights)
        for a, b in zip(ours, two_gradients(theirs, inputs, wanted, g, weights)): close(a, b)
        for a, b in zip(inputs, before):
            if isinstance(a, torch.Tensor): assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_nan_logit_is_torchs():
    x, y = special(1., nan, 2.).repeat(2, 1), torch.tensor([0, 2])
    x[1, 1] = 0
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    CrossEntropyFunction.apply(ours, y).backward()
    F.cross_entropy(theirs, y).backward()
    close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype):
    tol = dict(rtol=2e-2, atol=2e-2) if dtype in (torch.float16, torch.bfloat16) else {}
    y = torch.tensor([0, 2, -100])
    for function, shapes in {LinearFunction: [(3, 4), (2, 4), (2,)], ReLUFunction: [(3, 4)], SigmoidFunction: [(3, 4)],
                             MSELossFunction: [(3, 4), (3, 4)], CrossEntropyFunction: [(3, 4)]}.items():
        inputs = [torch.randn(s).to(dtype) for s in shapes]
        ours = [t.clone().requires_grad_() for t in inputs]
        theirs = [t.double().requires_grad_() for t in inputs]  # old torch has no mse_loss in half precision
        extra = (y,) if function is CrossEntropyFunction else ()
        a, b = function.apply(*ours, *extra), FUNCTIONS[function][0](*theirs, *extra)
        assert_close(a, b.to(dtype), **tol)
        g = torch.randn_like(a)
        a.backward(g), b.backward(g.double())
        for p, q in zip(ours, theirs): assert_close(p.grad, q.grad.to(dtype), **tol)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype(kind):
    x, y = rand(4, 5, wants=True), torch.tensor([0, 4, 1, 2])
    CrossEntropyFunction.apply(x, y.to(kind)).backward()
    other = x.detach().requires_grad_()
    F.cross_entropy(other, y).backward()
    close(x.grad, other.grad)


@named
def test_gradcheck_and_gradgradcheck(function, inputs):
    values = [t for t in inputs if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if not all(t.isfinite().all() and t.abs().max() < 1e3 and (t.abs().min() > 1e-4 or function is not ReLUFunction) for t in values if t.numel()):
        pytest.skip("finite differences need finite numbers away from the kink")
    if any(t.numel() > 1 and t.stride() and 0 in [s for s, n in zip(t.stride(), t.shape) if n > 1] for t in values):
        pytest.skip("gradcheck cannot move one element of an expanded tensor")
    indices = floats(inputs)
    for wanted in (indices, indices[:1], indices[-1:]):
        args = leaves(inputs, wanted)
        assert gradcheck(function.apply, args, check_batched_grad=True)
        assert gradgradcheck(function.apply, args, check_batched_grad=True)


# ---- torch.func

w1, b1, w2, b2, X, T = rand(5, 3), rand(5), rand(2, 5), rand(2), rand(4, 3), rand(4, 2)
labels = torch.tensor([0, 1, -100, 1])


def by_functions(w1, b1, w2, b2, x, t):
    h = ReLUFunction.apply(LinearFunction.apply(x, w1, b1))
    return MSELossFunction.apply(SigmoidFunction.apply(LinearFunction.apply(h, w2, b2)), t)


def by_torch(w1, b1, w2, b2, x, t):
    return F.mse_loss(torch.sigmoid(F.linear(F.relu(F.linear(x, w1, b1)), w2, b2)), t)


def classify_by_functions(w1, b1, w2, b2, x):
    return CrossEntropyFunction.apply(LinearFunction.apply(ReLUFunction.apply(LinearFunction.apply(x, w1, b1)), w2, b2), labels)


def classify_by_torch(w1, b1, w2, b2, x):
    return F.cross_entropy(F.linear(F.relu(F.linear(x, w1, b1)), w2, b2), labels)


TRANSFORMS = {"grad": lambda f, n: grad(f, n), "jacrev": lambda f, n: jacrev(f, n), "jacrev of grad": lambda f, n: jacrev(grad(f, n), n),
              "hessian": lambda f, n: jacrev(jacrev(f, n), n), "third": lambda f, n: jacrev(jacrev(jacrev(f, n), n), n)}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("which", ["mse", "cross-entropy"])
def test_transforms(name, which):
    ours, theirs, args = ((by_functions, by_torch, (w1, b1, w2, b2, X, T)) if which == "mse" else
                          (classify_by_functions, classify_by_torch, (w1, b1, w2, b2, X)))
    transform = TRANSFORMS[name]
    for n in ((0, 1), (4,)) if name == "third" else ((0,), (1, 3), tuple(range(len(args)))):
        close(transform(ours, n)(*args), transform(theirs, n)(*args))


@pytest.mark.parametrize("n", [(0,), (1,), (0, 1, 2, 3), (4,), (5,), (0, 1, 2, 3, 4, 5)])
def test_vmap(n):
    shared = (None,) * 4
    for dims, args in [(shared + (0, 0), (w1, b1, w2, b2, X, T)), (shared + (1, None), (w1, b1, w2, b2, X.T, T[0])),
                       ((0,) * 4 + (None, None), (*[torch.stack([p, 2 * p, -p]) for p in (w1, b1, w2, b2)], X, T)),
                       ((0, None, 0, None, 0, 0), (torch.stack([w1] * 4), b1, torch.stack([w2, -w2] * 2), b2, X, T))]:
        close(vmap(by_functions, dims)(*args), vmap(by_torch, dims)(*args))
        close(vmap(grad(by_functions, n), dims)(*args), vmap(grad(by_torch, n), dims)(*args))
        close(vmap(jacrev(jacrev(by_functions, n), n), dims)(*args), vmap(jacrev(jacrev(by_torch, n), n), dims)(*args))


def test_vmap_of_vmap_and_grad_of_vmap():
    ours = lambda x, w: LinearFunction.apply(x, w)
    ws = torch.stack([w1, -w1])
    close(vmap(vmap(ours, (0, None)), (None, 0))(X, ws), vmap(vmap(F.linear, (0, None)), (None, 0))(X, ws))
    total = lambda f: lambda w: vmap(f, (0, None))(X, w).pow(3).sum()
    close(grad(total(ours))(w1), grad(total(F.linear))(w1))
    close(vmap(ReLUFunction.apply, 1, 1)(X), X.relu())


def test_autograd_functional():
    from torch.autograd.functional import hessian, jacobian
    for vectorize in (True, False):
        close(jacobian(lambda w: LinearFunction.apply(X, w, b1), w1, vectorize=vectorize), jacobian(lambda w: F.linear(X, w, b1), w1))
        close(hessian(lambda *p: by_functions(*p, X, T), (w1, b1, w2, b2), vectorize=vectorize), hessian(lambda *p: by_torch(*p, X, T), (w1, b1, w2, b2)))


def test_what_does_not_go_says_so():
    with pytest.raises(RuntimeError, match="vmap support"): vmap(CrossEntropyFunction.apply)(rand(3, 4), torch.zeros(3, dtype=torch.long))
    for function, inputs in {LinearFunction: (X, w1, b1), ReLUFunction: (X,), SigmoidFunction: (X,), MSELossFunction: (X, X), CrossEntropyFunction: (X, labels)}.items():
        rest = inputs[1:]
        with pytest.raises(NotImplementedError, match="jvp"): jvp(lambda x: function.apply(x, *rest), (X,), (X,))
    with pytest.raises(NotImplementedError, match="jvp"): jacfwd(ReLUFunction.apply)(X)


# ---- what is kept, computed, let go

def kept(f, *args):
    tensors = []
    def pack(t):
        tensors.append(t)
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): out = f(*args)
    return out, tensors


@pytest.mark.parametrize("wanted", [w for n in (1, 2, 3) for w in itertools.combinations(range(3), n)])
def test_linear_keeps_and_computes_only_what_is_wanted(wanted):
    args = leaves((rand(7, 3), rand(5, 3), rand(5)), wanted)
    out, tensors = kept(LinearFunction.apply, *args)
    expected = ([args[0]] if 1 in wanted else []) + ([args[1]] if 0 in wanted else [])
    assert [t.data_ptr() for t in tensors] == [t.data_ptr() for t in expected]
    with FlopCounterMode(display=False) as counter: out.backward(torch.randn_like(out))
    assert counter.get_total_flops() == 2 * 7 * 3 * 5 * len({0, 1} & {*wanted})
    for i, t in enumerate(args): assert (t.grad is not None) == (i in wanted)


def test_elementwise_functions_keep_their_output_without_a_copy():
    for function in (ReLUFunction, SigmoidFunction):
        out, tensors = kept(function.apply, rand(4, 3, wants=True))
        assert [t.data_ptr() for t in tensors] == [out.data_ptr()]


def test_losses_keep_their_inputs_without_a_copy():
    for function, inputs in [(MSELossFunction, (rand(4, 3, wants=True), rand(4, 3))), (CrossEntropyFunction, (rand(4, 3, wants=True), labels))]:
        _, tensors = kept(function.apply, *inputs)
        assert [t.data_ptr() for t in tensors] == [t.data_ptr() for t in inputs]


def test_mse_computes_only_the_gradient_that_is_wanted():
    x, t = rand(4, wants=True), rand(4)
    out = MSELossFunction.apply(x, t)
    assert out.grad_fn.apply(torch.ones_like(out))[1] is None
    x, t = rand(4), rand(4, wants=True)
    out = MSELossFunction.apply(x, t)
    assert out.grad_fn.apply(torch.ones_like(out))[0] is None


@named
def test_a_freed_graph_raises_torchs_error_and_a_retained_one_adds(function, inputs):
    args = leaves(inputs, floats(inputs))
    out = function.apply(*args)
    g = torch.randn_like(out)
    out.backward(g, retain_graph=True)
    once = [args[i].grad.clone() for i in floats(inputs)]
    out.backward(g)
    for i, first in zip(floats(inputs), once): close(args[i].grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"): out.backward(g)


def test_nothing_keeps_the_output_alive():
    gc.collect()
    gc.disable()
    try:
        for function, inputs in [(ReLUFunction, (X,)), (SigmoidFunction, (X,)), (LinearFunction, (X, w1, b1)), (MSELossFunction, (X, X.clone())), (CrossEntropyFunction, (X, labels))]:
            out = function.apply(*leaves(inputs, (0,)))
            node = weakref.ref(out.grad_fn)
            del out
            assert node() is None, function
    finally:
        gc.enable()


def test_a_change_in_place_is_noticed():
    for function in (ReLUFunction, SigmoidFunction):
        out = function.apply(rand(3, wants=True))
        out.mul_(2)
        with pytest.raises(RuntimeError, match="inplace"): out.sum().backward()
    x = rand(4, 3)
    out = LinearFunction.apply(x, w1.clone().requires_grad_())
    x.add_(1)
    with pytest.raises(RuntimeError, match="inplace"): out.sum().backward()


@named
def test_outputs_are_fresh_and_unrecorded_without_need(function, inputs):
    out = function.apply(*inputs)
    assert out.grad_fn is None and not out.requires_grad
    for t in inputs:
        if isinstance(t, torch.Tensor) and t.numel(): assert out.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()
    with torch.no_grad(): assert function.apply(*leaves(inputs, floats(inputs))).grad_fn is None


def test_positive_relu_is_no_alias():
    x = torch.ones(3, requires_grad=True)
    out = ReLUFunction.apply(x)
    g = torch.ones(3)
    out.backward(g)
    x.grad.add_(1)
    assert torch.equal(g, torch.ones(3)) and out.data_ptr() != x.data_ptr()


# ---- errors

def bad_inputs():
    x = torch.randn(4, 3)
    yield from ((LinearFunction, a) for a in [
        (x, torch.randn(3, 2)), (x, torch.randn(2, 4)), (x, torch.randn(3)), (x, torch.randn(2, 3), torch.randn(3)), (torch.tensor(1.), torch.randn(2, 3)),
        (x.double(), torch.randn(2, 3)), (x.long(), torch.ones(2, 3).long()), (x, torch.randn(2, 3), torch.randn(2).double()),
        ([[1., 2., 3.]], torch.randn(2, 3)), (x.numpy(), torch.randn(2, 3)), (x, None)])
    yield from ((f, a) for f in (ReLUFunction, SigmoidFunction) for a in [(x.long(),), ([1., 2.],), (None,), (x > 0,), (1.,)])
    yield from ((MSELossFunction, a) for a in [
        (x, torch.randn(4)), (torch.randn(4, 1), torch.randn(4)), (x, x.double()), (x.long(), x.long()), (x, x.tolist()), (x[:0], x[:0])])
    yield from ((CrossEntropyFunction, a) for a in [
        (x, torch.tensor([0, 1, 2, 3])), (x, torch.tensor([0, 1, 2, -1])), (x, torch.tensor([0, 1])), (x, torch.rand(4)), (x, x.softmax(1)),
        (x[:0], torch.zeros(0).long()), (x, torch.full((4,), -100)), (x, [0, 1, 2, 0]), (x, torch.ones(4, dtype=torch.bool)), (x.long(), torch.zeros(4).long()),
        (torch.tensor(1.), torch.tensor(0))])


@pytest.mark.parametrize("function, args", list(bad_inputs()))
def test_errors_are_those_of_the_plain_functions(function, args):
    wanting = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as plain: FUNCTIONS[function][1](*wanting)
    with pytest.raises(type(plain.value)) as raised: function.apply(*wanting)
    assert type(raised.value) is type(plain.value) and str(raised.value) == str(plain.value)


def test_too_few_and_too_many_arguments():
    for function, args in [(LinearFunction, (X,)), (ReLUFunction, ()), (ReLUFunction, (X, X)), (MSELossFunction, (X,)), (CrossEntropyFunction, (X,))]:
        with pytest.raises(TypeError): function.apply(*args)


# ---- LinearLayer

OPTIONS = [dict(), dict(bias=False), dict(dtype=torch.double), dict(bias=False, dtype=torch.float16), dict(device="cpu")]


@pytest.mark.parametrize("options", OPTIONS)
def test_linear_layer_is_nn_linear(options):
    torch.manual_seed(5)
    ours = LinearLayer(7, 4, **options)
    after = torch.rand(1)
    torch.manual_seed(5)
    theirs = nn.Linear(7, 4, **options)
    assert torch.equal(after, torch.rand(1))
    assert list(ours.state_dict()) == list(theirs.state_dict()) and [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for p, q in zip(ours.parameters(), theirs.parameters()): assert torch.equal(p, q) and p.dtype == q.dtype and p.requires_grad and type(p) is nn.Parameter
    assert repr(ours) == repr(theirs).replace("Linear(", "LinearLayer(") and (ours.bias is None) == (theirs.bias is None)
    assert (ours.in_features, ours.out_features) == (7, 4)
    x = torch.randn(3, 7, dtype=ours.weight.dtype)
    assert_close(ours(x), theirs(x))
    ours.load_state_dict(theirs.state_dict()), theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(6)
    ours.reset_parameters()
    torch.manual_seed(6)
    theirs.reset_parameters()
    assert torch.equal(ours.weight, theirs.weight)


def test_linear_layer_on_meta_and_empty():
    assert LinearLayer(3, 2, device="meta").weight.is_meta
    assert nn.utils.skip_init(LinearLayer, 3, 2).weight.shape == (2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sizes in [(0, 2), (3, 0)]: assert_close(LinearLayer(*sizes)(torch.zeros(4, sizes[0])).shape, nn.Linear(*sizes)(torch.zeros(4, sizes[0])).shape)
    with pytest.raises(RuntimeError): LinearLayer(-1, 2)


def test_linear_layer_errors_and_reach():
    layer = LinearLayer(3, 2)
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(2, 3\)"): layer(torch.randn(4, 5))
    with pytest.raises(TypeError): layer(torch.randn(4, 3).double())
    with pytest.raises(TypeError): layer([1., 2., 3.])
    assert layer.double()(rand(3)).dtype == torch.double
    for shape in [(3,), (0, 3), (2, 4, 3), (2, 2, 4, 3)]: assert layer(rand(*shape)).shape == (*shape[:-1], 2)
    per_example = vmap(grad(lambda p, x: functional_call(layer, p, x).sum()), (None, 0))(dict(layer.named_parameters()), rand(4, 3))
    assert per_example["weight"].shape == (4, 2, 3)


# ---- Module

class Net(Module):
    def __init__(self, n, scale=1.):
        self.first, self.second = LinearLayer(3, n), nn.Linear(n, 2)
        self.extra = nn.Parameter(torch.full((2,), scale))
        self.register_buffer("count", torch.zeros(()))
        self.tag = "kept"

    def forward(self, x):
        return self.extra * self.second(ReLUFunction.apply(self.first(x)))


class Mixin:
    def __init__(self, *args, **kwargs):
        self.got = (args, kwargs)


def test_module_needs_no_init():
    net = Net(4, scale=2.)
    assert [n for n, _ in net.named_parameters()] == ["extra", "first.weight", "first.bias", "second.weight", "second.bias"]
    assert [n for n, _ in net.named_buffers()] == ["count"] and [n for n, _ in net.named_children()] == ["first", "second"]
    assert net(torch.randn(5, 3)).shape == (5, 2) and net.training and not net.eval().second.training
    assert set(vars(nn.Module())) <= set(vars(net)) and isinstance(net, nn.Module)
    assert net.double().first.weight.dtype == torch.double
    calls = []
    net.register_forward_hook(lambda *a: calls.append(1))
    net(rand(5, 3)).sum().backward()
    assert calls == [1] and all(p.grad is not None for p in net.parameters())


def test_two_modules_share_nothing():
    a, b = Net(4), Net(4)
    a.more = nn.Linear(1, 1)
    assert "more" not in dict(b.named_children()) and a._parameters is not b._parameters
    assert not list(Module().parameters()) and Module()._modules is not Module()._modules


@pytest.mark.parametrize("when", ["first", "late", "twice"])
def test_super_init_does_no_harm(when):
    class Polite(Module):
        def __init__(self, n):
            if when != "late": super().__init__()
            self.w = nn.Parameter(torch.zeros(n))
            if when != "first": super().__init__()
    assert list(Polite(2).state_dict()) == ["w"]


def test_copies_and_pickles():
    net = Net(4)
    net.second.weight.requires_grad_(False)
    x = torch.randn(5, 3)
    for other in [copy.deepcopy(net), *[pickle.loads(pickle.dumps(net, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]]:
        assert_close(other(x), net(x))
        assert other.tag == "kept" and other.extra is not net.extra and list(other.state_dict()) == list(net.state_dict())
        assert not other.second.weight.requires_grad and type(other) is Net
    net.load_state_dict(copy.deepcopy(net.state_dict()))
    shallow = copy.copy(net)
    assert shallow.extra is net.extra


def test_saved_and_loaded(tmp_path):
    net = Net(4)
    torch.save(net, tmp_path / "net.pt")
    other = torch.load(tmp_path / "net.pt", weights_only=False)
    assert_close(other(torch.ones(1, 3)), net(torch.ones(1, 3)))


def test_several_base_classes():
    class Both(Module, nn.Linear): pass
    both = Both(3, 2, bias=False)
    assert list(both.state_dict()) == ["weight"] and both(torch.randn(4, 3)).shape == (4, 2)

    class Behind(nn.Linear, Module):
        def __init__(self, n):
            super().__init__(n, n)
            self.extra = nn.Parameter(torch.zeros(1))
    assert list(Behind(2).state_dict()) == ["weight", "bias", "extra"]

    class First(Mixin, Module):
        def __init__(self, n):
            self.w = nn.Parameter(torch.zeros(n))
            super().__init__(n, key=1)
    assert First(2).got == ((2,), {"key": 1}) and list(First(2).state_dict()) == ["w"]

    class Asked(Module, Mixin):
        call_super_init = True
    assert Asked(1, key=2).got == ((1,), {"key": 2})

    class Left(Module):
        def __init__(self, **kwargs):
            self.a = nn.Parameter(torch.zeros(1))
            super().__init__(**kwargs)
    class Right(Module):
        def __init__(self, size):
            self.b = nn.Parameter(torch.zeros(size))
            super().__init__()
    class Diamond(Left, Right): pass
    assert list(Diamond(size=2).state_dict()) == ["a", "b"]


def test_arguments_nobody_takes():
    class Plain(Module): pass
    with pytest.raises(TypeError): Plain(1)
    with pytest.raises(TypeError): Plain(a=1)


def test_in_containers_and_optimisers():
    net = nn.Sequential(Net(4), Net(4))
    before = [p.clone() for p in net[0].parameters()]
    opt = torch.optim.SGD(net[0].parameters(), lr=0.1)
    net[0](torch.randn(5, 3)).square().mean().backward()
    opt.step()
    assert any(not torch.equal(p, q) for p, q in zip(before, net[0].parameters()))
    assert len(list(net.modules())) == 7 and "LinearLayer" in repr(net)


# ---- together

def test_a_training_like_that_of_chapter_04():
    by_hand = layers.Model(layers.Sequential(layers.Linear(6, 8), layers.ReLU(), layers.Linear(8, 3)), layers.CrossEntropyLoss()).to(torch.double)
    class ReLU(Module):
        def forward(self, x): return ReLUFunction.apply(x)
    net = nn.Sequential(LinearLayer(6, 8), ReLU(), LinearLayer(8, 3)).double()
    net.load_state_dict(by_hand.net.state_dict())
    x, y = rand(20, 6), torch.randint(3, (20,))
    opt = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(20):
        by_hand.zero_grad()
        loss = by_hand(x, y)
        by_hand.backward()
        for p in by_hand.parameters(): p -= 0.5 * p.g
        opt.zero_grad()
        other = CrossEntropyFunction.apply(net(x), y)
        other.backward()
        opt.step()
        close(other.detach(), loss)
    for p, q in zip(net.parameters(), by_hand.parameters()): close(p.data, q.data)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=3), st.integers(0, 4), st.integers(0, 4), st.booleans(), st.integers(0, 10 ** 6))
def test_linear_of_any_shape(lead, n_in, n_out, bias, seed):
    torch.manual_seed(seed)
    inputs = [rand(*lead, n_in, wants=True), rand(n_out, n_in, wants=True)] + ([rand(n_out, wants=True)] if bias else [])
    ours, theirs = LinearFunction.apply(*inputs), F.linear(*inputs)
    close(ours, theirs)
    g = torch.randn_like(theirs)
    close(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(theirs, inputs, g))
