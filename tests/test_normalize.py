"""fromfound.normalize against torch.nn: outputs, gradients, running statistics, state dicts; mutants; whole nets."""
import copy
import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from fromfound.backward import add_grad, check_grads
from fromfound.layers import CrossEntropyLoss, Linear, Model, Parameter, ReLU, Sequential, no_grad
from fromfound.normalize import BatchNorm1d, BatchNorm2d, Dropout, LayerNorm, l1_penalty, l2_penalty
from fromfound.optim import SGD

TIGHT = dict(rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


def pair(name, *args, **kwargs):
    "Return our layer and torch's, in float64, with equal random weights."
    ours, theirs = globals()[name](*args, **kwargs), getattr(nn, name)(*args, **kwargs).double()
    for p in ours.parameters(): p.data.normal_()
    theirs.load_state_dict(ours.to(torch.float64).state_dict())
    return ours, theirs


def agree(ours, theirs, shape, transposed=False):
    "Check output, gradients and state of one call and its way back, with a random gradient coming in."
    x, g = (3 + 2 * torch.randn(shape, dtype=torch.float64) for _ in range(2))
    if transposed: x, g = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, g))
    kept, xt = x.clone(), x.clone().requires_grad_()
    ours.zero_grad(), theirs.zero_grad()
    out, out_t = ours(x), theirs(xt)
    out.g = g.clone()
    ours.backward()
    out_t.backward(g)
    assert_close(out, out_t.detach(), **TIGHT)
    assert_close(x.g, xt.grad, **TIGHT)
    assert torch.equal(x, kept) and torch.equal(out.g, g)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True): assert_close(p.g, q.grad, **TIGHT)
    for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other and a.dtype == b.dtype
        assert_close(a, b, **TIGHT)


BATCH_NORMS = [("BatchNorm1d", (5, 3)), ("BatchNorm1d", (2, 1)), ("BatchNorm1d", (4, 3, 6)), ("BatchNorm1d", (1, 3, 2)),
               ("BatchNorm2d", (4, 3, 5, 2)), ("BatchNorm2d", (1, 2, 3, 3))]


@pytest.mark.parametrize("name, shape", BATCH_NORMS)
@pytest.mark.parametrize("options", [{}, dict(eps=0.1, momentum=0.3), dict(momentum=None), dict(affine=False),
                                     dict(track_running_stats=False), dict(affine=False, track_running_stats=False)])
def test_batch_norms_are_torchs_in_both_modes(name, shape, options):
    ours, theirs = pair(name, shape[1], **options)
    for _ in range(3): agree(ours, theirs, shape)
    agree(ours, theirs, (7, *shape[1:]), transposed=True)
    for _ in range(2): agree(ours.eval(), theirs.eval(), shape)
    if options.get("track_running_stats", True): agree(ours, theirs, (1, *shape[1:]))
    agree(ours.train(), theirs.train(), shape)


@settings(max_examples=25, deadline=None)
@given(batch=st.lists(st.integers(1, 4), max_size=3), shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
       affine=st.booleans(), bias=st.booleans(), eps=st.sampled_from([1e-5, 0.1]), transposed=st.booleans())
def test_layer_norm_is_torchs(batch, shape, affine, bias, eps, transposed):
    ours, theirs = pair("LayerNorm", shape, eps=eps, elementwise_affine=affine, bias=bias)
    agree(ours, theirs, (*batch, *shape), transposed)
    agree(ours.eval(), theirs.eval(), (*batch, *shape))


def test_layer_norm_of_an_int():
    agree(*pair("LayerNorm", 4), (3, 2, 4))
    assert LayerNorm(4).normalized_shape == (4,)


def each_layer():
    return [(BatchNorm1d(3), (5, 3)), (BatchNorm1d(3), (3, 3, 2)), (BatchNorm2d(2), (3, 2, 2, 2)), (LayerNorm(4), (3, 4)),
            (LayerNorm((2, 3)), (2, 2, 3)), (LayerNorm(4, bias=False), (3, 4)), (LayerNorm(4, elementwise_affine=False), (3, 4)),
            (BatchNorm1d(3, affine=False), (4, 3)), (BatchNorm1d(3, track_running_stats=False), (4, 3)),
            (Dropout(0.4), (3, 4)), (Dropout(0), (3, 4)), (Dropout(1), (3, 4)), (Dropout(generator=torch.Generator()), (3, 4))]


@pytest.mark.parametrize("i", range(len(each_layer())))
def test_check_grads(i):
    layer, shape = each_layer()[i]
    for p in layer.parameters(): p.data.normal_()
    for mode in (True, False): check_grads(layer.train(mode), torch.randn(shape))


def mutants():
    "Layers with one mistake each."
    class Base(BatchNorm1d):
        def bwd(self, out, x):
            (xhat, r, by_batch), g = out.saved, out.g
            add_grad(self.weight, self.dweight(g, xhat, r))
            add_grad(self.bias, self.dbias(g))
            add_grad(x, self.dx(g, xhat, r, by_batch))
        def dweight(self, g, xhat, r): return (g * xhat).sum(0)
        def dbias(self, g): return g.sum(0)
        def dx(self, g, xhat, r, by_batch):
            if not by_batch: return g * r * self.weight
            return r * self.weight * (g - g.mean(0) - xhat * (g * xhat).mean(0))

    def mutant(name, **methods): return type(name, (Base,), methods)
    return Base, [
        mutant("no_mean", dx=lambda self, g, xhat, r, b: r * self.weight * (g - xhat * (g * xhat).mean(0))),
        mutant("no_variance", dx=lambda self, g, xhat, r, b: r * self.weight * (g - g.mean(0))),
        mutant("direct_only", dx=lambda self, g, xhat, r, b: r * self.weight * g),
        mutant("no_scale", dx=lambda self, g, xhat, r, b: r * (g - g.mean(0) - xhat * (g * xhat).mean(0))),
        mutant("no_std", dx=lambda self, g, xhat, r, b: self.weight * (g - g.mean(0) - xhat * (g * xhat).mean(0))),
        mutant("unbiased", dx=lambda self, g, xhat, r, b: r * self.weight * (
            g - g.mean(0) - xhat * (g * xhat).sum(0) / (len(g) - 1))),
        mutant("plus", dx=lambda self, g, xhat, r, b: r * self.weight * (g - g.mean(0) + xhat * (g * xhat).mean(0))),
        mutant("weight_by_sum", dweight=lambda self, g, xhat, r: g.sum(0)),
        mutant("weight_not_normalised", dweight=lambda self, g, xhat, r: (g * xhat / r).sum(0)),
        mutant("weight_mean", dweight=lambda self, g, xhat, r: (g * xhat).mean(0)),
        mutant("bias_mean", dbias=lambda self, g: g.mean(0)),
        mutant("wrong_axis", dx=lambda self, g, xhat, r, b: r * self.weight * (
            g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True))),
    ]


def test_check_grads_rejects_mutants():
    right, wrong = mutants()
    def random(kind):
        layer = kind(3)
        layer.weight.data.uniform_(0.5, 2)
        return layer
    check_grads(random(right), torch.randn(5, 3))
    check_grads(random(right).eval(), torch.randn(5, 3))
    for kind in wrong:
        with pytest.raises(AssertionError): check_grads(random(kind), 2 * torch.randn(5, 3))

    class TrainingFormulaInEval(right):
        def dx(self, g, xhat, r, by_batch): return super().dx(g, xhat, r, True)
    with pytest.raises(AssertionError): check_grads(random(TrainingFormulaInEval).eval(), torch.randn(5, 3))

    class AnotherMask(Dropout):
        def bwd(self, out, x): add_grad(x, out.g * torch.empty_like(x).bernoulli_(0.5) * 2)
    class NotScaled(Dropout):
        def bwd(self, out, x): add_grad(x, out.g * (out.saved > 0))
    class WeightOutsideTheMeans(LayerNorm):
        def bwd(self, out, x):
            (xhat, r), g = out.saved, out.g
            add_grad(self.weight, (g * xhat).sum(0))
            add_grad(self.bias, g.sum(0))
            add_grad(x, self.weight * r * (g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True)))
    layer = WeightOutsideTheMeans(4)
    layer.weight.data.normal_()
    for mutant in (AnotherMask(), NotScaled(), layer):
        with pytest.raises(AssertionError): check_grads(mutant, torch.randn(4, 4))


# ---- state

@pytest.mark.parametrize("name, shape", [("BatchNorm1d", (5, 3)), ("BatchNorm2d", (5, 3, 2, 2)), ("LayerNorm", (5, 3))])
def test_state_dicts_go_both_ways(name, shape):
    args = shape[1] if name != "LayerNorm" else 3
    ours, theirs = globals()[name](args), getattr(nn, name)(args)
    x = torch.randn(shape)
    for _ in range(3): theirs(x)
    ours.load_state_dict(theirs.state_dict())
    for _ in range(2): ours(x + 1)
    theirs.load_state_dict(ours.state_dict())
    assert_close(ours.eval()(x), theirs.eval()(x).detach())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    if "Batch" in name:
        assert ours.num_batches_tracked.dtype == torch.int64 and ours.num_batches_tracked.item() == 5
        ours.to(torch.float64)
        assert ours.running_var.dtype == torch.float64 and ours.num_batches_tracked.dtype == torch.int64
        assert [n for n, _ in ours.named_parameters()] == ["weight", "bias"]


def test_copies_do_not_share_running_statistics():
    layer = BatchNorm1d(2)
    twin = copy.deepcopy(layer)
    layer(torch.randn(4, 2))
    assert twin.num_batches_tracked.item() == 0 and torch.equal(twin.running_mean, torch.zeros(2))


def test_eval_mode_and_no_running_statistics_leave_no_trace():
    layer = BatchNorm1d(2)
    layer(torch.randn(4, 2))
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    layer.eval()(torch.randn(4, 2))
    assert all(torch.equal(t, before[n]) for n, t in layer.state_dict().items())
    assert list(BatchNorm1d(2, affine=False, track_running_stats=False).state_dict()) == []


# ---- numbers and errors

def test_float32_at_a_large_mean():
    x = 1000 + torch.randn(64, 100)
    for layer, axis, other in [(BatchNorm1d(100), 0, nn.BatchNorm1d(100)), (LayerNorm(100), 1, nn.LayerNorm(100))]:
        truth = other.double()(x.double()).detach()
        assert (layer(x).double() - truth).abs().max() < 1e-3
        assert_close(layer(x).std(axis, correction=0), torch.ones(x.shape[1 - axis]), rtol=1e-4, atol=0)
    images = 1000 + torch.randn(8, 4, 14, 14)
    truth = nn.BatchNorm2d(4).double()(images.double()).detach()
    assert (BatchNorm2d(4)(images).double() - truth).abs().max() < 1e-3


def test_constant_features_give_the_bias():
    for layer, x in [(BatchNorm1d(3), torch.full((4, 3), 7.0)), (LayerNorm(3), torch.full((4, 3), -2.0))]:
        layer.bias.data.normal_()
        out = layer(x)
        assert_close(out, layer.bias.expand(4, 3).clone())
        out.g = torch.randn(4, 3)
        layer.backward()
        assert x.g.isfinite().all()


@pytest.mark.parametrize("layer, shape, text", [
    (BatchNorm1d(3), (1, 3), r"more than one value per channel .* \(1, 3\) has 1"),
    (BatchNorm1d(3), (1, 3, 1), r"more than one value per channel"), (BatchNorm2d(3), (1, 3, 1, 1), r"more than one value"),
    (BatchNorm1d(3), (0, 3), r"has 0"),
    (BatchNorm1d(3), (3,), r"wants \(N, C\) or \(N, C, L\) with C = 3, not \(3,\)"), (BatchNorm1d(3), (4, 2), r"not \(4, 2\)"),
    (BatchNorm1d(3), (4, 3, 2, 2), "BatchNorm1d wants"), (BatchNorm2d(3), (4, 3), r"wants \(N, C, H, W\)"),
    (BatchNorm2d(3), (4, 2, 3, 3), r"with C = 3, not \(4, 2, 3, 3\)"),
    (LayerNorm(3), (4, 2), r"ends in \(3,\), not \(4, 2\)"), (LayerNorm((2, 3)), (3,), r"ends in \(2, 3\), not \(3,\)"),
])
def test_what_is_refused_changes_nothing(layer, shape, text):
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    with pytest.raises(ValueError, match=text): layer(torch.ones(shape))
    assert all(torch.equal(t, before[n]) for n, t in layer.state_dict().items())


def test_one_example_and_none_are_fine_in_eval_mode():
    for shape in [(1, 3), (0, 3)]: assert BatchNorm1d(3).eval()(torch.ones(shape)).shape == shape
    assert LayerNorm(3)(torch.ones(0, 3)).shape == (0, 3)
    with pytest.raises(ValueError, match="more than one value"): BatchNorm1d(3, track_running_stats=False).eval()(torch.ones(1, 3))


# ---- dropout

@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_statistics(p):
    out = Dropout(p)(torch.ones(400, 500))
    assert abs((out == 0).float().mean() - p) < 0.005 and abs(out.mean() - 1) < 0.02
    assert_close(out[out != 0].unique(), torch.tensor([1 / (1 - p)]))


def test_dropout_is_torchs_for_the_same_seed_and_its_own_generators():
    x = torch.randn(5, 4)
    for p in (0, 0.3, 1):
        torch.manual_seed(1)
        want = nn.Dropout(p)(x)
        torch.manual_seed(1)
        assert_close(Dropout(p)(x), want)
    make = lambda: Dropout(0.5, torch.Generator().manual_seed(3))
    state, first = torch.get_rng_state(), make()(x)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(make()(x), first)
    layer = make()
    assert not torch.equal(layer(torch.ones(100)), layer(torch.ones(100)))


def test_dropout_backward_has_the_forwards_mask():
    layer, x, y = Dropout(0.5), torch.randn(50), torch.randn(50)
    out, second = layer(x), layer(y)
    for t, o in ((y, second), (x, out)):  # last call first
        o.g = torch.ones(50)
        layer.backward()
        assert_close(t.g, torch.where(o == 0, 0.0, 2.0))


def test_dropout_in_eval_mode_and_at_the_ends():
    x = torch.randn(5, 4)
    with no_grad(): assert Dropout(0.5).eval()(x) is not x
    assert torch.equal(Dropout(0.5).eval()(x), x) and torch.equal(Dropout(0)(x), x)
    assert torch.equal(Dropout(1)(x).abs(), torch.zeros(5, 4))
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="p is a probability"): Dropout(p)


# ---- penalties

@pytest.mark.parametrize("penalty, formula", [(l2_penalty, lambda w: w.square().sum() / 2), (l1_penalty, lambda w: w.abs().sum())])
def test_penalties(penalty, formula):
    params = [Parameter(torch.randn(3, 2)), Parameter(torch.randn(4))]
    leaves, kept = [p.detach().clone().requires_grad_() for p in params], [p.clone() for p in params]
    params[1].g = torch.ones(4)
    value = penalty((p for p in params), 0.3)
    want = 0.3 * sum(map(formula, leaves))
    want.backward()
    assert_close(value, want.detach())
    assert_close(params[0].g, leaves[0].grad)
    assert_close(params[1].g, leaves[1].grad + 1)  # added
    assert all(map(torch.equal, params, kept)) and not value.requires_grad
    assert penalty([], 0.3).shape == ()
    double = Parameter(torch.randn(3, dtype=torch.float64))
    assert penalty([double], 0.1).dtype == double.g.dtype == torch.float64


def test_l2_is_weight_decay():
    one, two = (Linear(3, 2) for _ in range(2))
    two.load_state_dict(one.state_dict())
    for p in two.parameters(): p.g = torch.zeros_like(p)
    for p in one.parameters(): p.g = torch.zeros_like(p)
    l2_penalty(one.parameters(), 0.1)
    SGD(one.parameters(), lr=0.5).step()
    SGD(two.parameters(), lr=0.5, weight_decay=0.1).step()
    for p, q in zip(one.parameters(), two.parameters()): assert_close(p, q)


# ---- in nets

@pytest.mark.parametrize("norm", ["BatchNorm1d", "LayerNorm"])
def test_a_net_trains_along_torchs_curve(norm):
    ours = Sequential(Linear(6, 8), globals()[norm](8), ReLU(), Linear(8, 8, bias=False), globals()[norm](8), ReLU(), Linear(8, 3))
    theirs = nn.Sequential(nn.Linear(6, 8), getattr(nn, norm)(8), nn.ReLU(), nn.Linear(8, 8, bias=False), getattr(nn, norm)(8),
                           nn.ReLU(), nn.Linear(8, 3)).double()
    model = Model(ours.to(torch.float64), CrossEntropyLoss())
    theirs.load_state_dict(ours.state_dict())
    mine, other = SGD(model.parameters(), lr=0.1, momentum=0.9), torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(400, 6, dtype=torch.float64), torch.randint(0, 3, (400,))
    for step in range(50):
        rows = torch.randint(0, 400, (16,))
        mine.zero_grad(), other.zero_grad()
        loss, want = model(x[rows], y[rows]), nn.functional.cross_entropy(theirs(x[rows]), y[rows])
        model.backward(), want.backward()
        mine.step(), other.step()
        assert_close(loss, want.detach(), **TIGHT)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True): assert_close(a, b, **TIGHT)
    assert_close(ours.eval()(x), theirs.eval()(x).detach(), **TIGHT)


@pytest.mark.parametrize("i", range(len(each_layer())))
def test_nothing_stays_reachable_and_the_input_gradient_is_optional(i):
    layer, shape = each_layer()[i]
    def call(**kwargs):
        x = torch.randn(shape)
        out = layer(x)
        out.g = torch.randn(shape)
        layer.backward(**kwargs)
        assert hasattr(x, "g") == (not kwargs)
        return [weakref.ref(t) for t in (x, out, out.g)]
    gc.disable()
    try: assert [ref() for ref in call() + call(input_grad=False)] == [None] * 6
    finally: gc.enable()


def test_works_on_tensors_that_require_grad_and_with_two_calls():
    for layer, shape in each_layer():
        for p in layer.parameters(): p.requires_grad_()
        x = torch.randn(shape, requires_grad=True)
        out = layer(x)
        out.g = torch.ones(shape)
        layer.backward()
        assert not out.requires_grad and not x.g.requires_grad and x.grad is None
        assert all(not t.requires_grad for n, t in layer.state_dict().items())
    net = Sequential(norm := BatchNorm1d(3), Linear(3, 3), norm)
    check_grads(net, torch.randn(5, 3))
