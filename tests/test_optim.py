"""fromfound.optim: every option against torch, states swapped in mid-run, torch's schedulers, clipping and the finder."""
import copy
import inspect
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler
from torch.testing import assert_close

from fromfound import layers, optim

SHAPES = [(3, 4), (5,), (), (2, 1, 3), (0, 2)]


def options(**choices): return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


CASES = [("SGD", o) for o in options(momentum=[0, 0.9], dampening=[0, 0.3, -0.5], weight_decay=[0, 0.1], nesterov=[False, True],
                                     maximize=[False, True]) if not o["nesterov"] or (o["momentum"] and o["dampening"] == 0)]
CASES += [("RMSprop", o) for o in options(alpha=[0.99, 0.0], eps=[1e-8, 0.1], weight_decay=[0, 0.1], momentum=[0, 0.9],
                                          centered=[False, True], maximize=[False, True])]
CASES += [(name, o) for name in ("Adam", "AdamW") for o in options(
    betas=[(0.9, 0.999), (0.0, 0.5)], eps=[1e-8, 0.1], weight_decay=[0, 0.1], amsgrad=[False, True], maximize=[False, True])]
KINDS = [("SGD", dict(momentum=0.9)), ("RMSprop", {}), ("Adam", {}), ("AdamW", {})]


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


def pair(name, options, dtype=torch.float64):
    "Ours and torch's optimiser on equal parameters, in two groups with different lr and weight decay."
    ours = [torch.randn(s, dtype=torch.float64).to(dtype) for s in SHAPES]
    theirs = [nn.Parameter(p.clone()) for p in ours]
    def groups(params): return [{"params": params[:2]}, {"params": params[2:], "lr": 0.02, "weight_decay": 0.05}]
    return ours, theirs, getattr(optim, name)(groups(ours), lr=0.05, **options), getattr(torch.optim, name)(groups(theirs), lr=0.05, **options)


def give_grads(ours, theirs, t):
    for i, (p, q) in enumerate(zip(ours, theirs)):
        p.g = None if (t + i) % 4 == 0 else torch.randn_like(p)  # now and then one is missing
        q.grad = None if p.g is None else p.g.clone()


@pytest.mark.parametrize("name, options", CASES, ids=[f"{name}-{'-'.join(map(str, o.values()))}" for name, o in CASES])
def test_numbers_and_states_are_torchs_and_swap_in_mid_run(name, options):
    ours, theirs, optimizer, reference = pair(name, options)
    for t in range(12):
        give_grads(ours, theirs, t)
        grads = [None if p.g is None else p.g.clone() for p in ours]
        optimizer.step(), reference.step()
        assert_close(ours, [q.detach() for q in theirs], rtol=0, atol=1e-10, equal_nan=True)
        assert all(g is None or torch.equal(g, p.g) for g, p in zip(grads, ours)), "a gradient was changed"
        mine, its = optimizer.state_dict(), reference.state_dict()
        states = [{i: s for i, s in d["state"].items() if s} for d in (mine, its)]  # SGD without momentum remembers nothing
        assert_close(*states, rtol=1e-12, atol=1e-12, equal_nan=True)
        for a, b in zip(mine["param_groups"], its["param_groups"]): assert all(a[k] == b[k] for k in ("params", *optimizer.defaults))
        if t == 5:  # go on with fresh optimisers: ours from torch's state, torch's from ours
            optimizer = getattr(optim, name)([{"params": g["params"]} for g in optimizer.param_groups], lr=9)
            reference = getattr(torch.optim, name)([{"params": g["params"]} for g in reference.param_groups], lr=9)
            optimizer.load_state_dict(copy.deepcopy(its)), reference.load_state_dict(copy.deepcopy(mine))


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(["SGD", "RMSprop", "Adam", "AdamW"]), lr=st.floats(0, 1), share=st.floats(0, 0.999), decay=st.floats(0, 1))
def test_any_numbers_are_torchs(name, lr, share, decay):
    torch.manual_seed(0)
    more = {"SGD": dict(momentum=share), "RMSprop": dict(alpha=share), "Adam": dict(betas=(share, 0.9)), "AdamW": dict(betas=(0.9, share))}
    a, b = torch.randn(4, dtype=torch.double), None
    b = nn.Parameter(a.clone())
    optimizer = getattr(optim, name)([a], lr=lr, weight_decay=decay, **more[name])
    reference = getattr(torch.optim, name)([b], lr=lr, weight_decay=decay, **more[name])
    for _ in range(5):
        a.g = b.grad = torch.randn(4, dtype=torch.double)
        optimizer.step(), reference.step()
    assert_close(a, b.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name, options", KINDS)
def test_other_dtypes_in_place(name, options):
    for dtype, tol in [(torch.float32, 1e-6), (torch.bfloat16, 0.05)]:
        ours, theirs, optimizer, reference = pair(name, {**options, **({} if name == "SGD" else {"eps": 1e-3})}, dtype)
        places = [p.data_ptr() for p in ours]
        for t in range(10):
            give_grads(ours, theirs, t)
            optimizer.step(), reference.step()
        assert_close(ours, [q.detach() for q in theirs], rtol=tol, atol=tol)
        assert places == [p.data_ptr() for p in ours] and all(p.dtype == dtype for p in ours)


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam", "AdamW"])
def test_mixed_dtypes_in_one_group(name):
    ours = [torch.randn(3, 4).T, torch.randn(3, dtype=torch.float64)]
    theirs = [nn.Parameter(p.clone()) for p in ours]
    more = dict(momentum=0.9) if name == "SGD" else {}
    optimizer, reference = getattr(optim, name)(ours, lr=0.1, **more), getattr(torch.optim, name)(theirs, lr=0.1, **more)
    for _ in range(5):
        for p, q in zip(ours, theirs): p.g = q.grad = torch.randn_like(p)
        optimizer.step(), reference.step()
    assert_close(ours[1], theirs[1].detach(), rtol=0, atol=1e-10)
    assert_close(ours[0], theirs[0].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam", "AdamW"])
def test_signature_is_torchs_without_what_is_not_built(name):
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (optim, torch.optim))
    left_out = {"foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}
    assert [(n, p.default) for n, p in ours.items()] == [(n, p.default) for n, p in theirs.items() if n not in left_out]


def test_bad_options_and_parameters():
    w = torch.zeros(2)
    for bad in (dict(lr=-1), dict(lr=math.nan), dict(momentum=-0.1), dict(weight_decay=-1)):
        with pytest.raises(ValueError, match="can't be negative"): optim.SGD([w], **bad)
    for bad in (dict(nesterov=True), dict(nesterov=True, momentum=0.9, dampening=0.1)):
        with pytest.raises(ValueError, match="nesterov needs a momentum and no dampening"): optim.SGD([w], **bad)
    with pytest.raises(TypeError, match="fused"): optim.Adam([w], fused=True)
    with pytest.raises(ValueError): optim.SGD([])


def test_a_gradient_of_another_shape_raises_before_anything_moves():
    a, b = torch.zeros(2), torch.zeros(1, 3)
    optimizer = optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0)
    a.g, b.g = torch.ones(2), torch.ones(3)
    with pytest.raises(ValueError, match=r"a .g is \(3,\), but its parameter is \(1, 3\)"): optimizer.step()
    assert not a.any()


def test_g_and_not_grad():
    w = nn.Parameter(torch.zeros(2))
    optimizer = optim.SGD([w], lr=1.0)
    optimizer.step()  # no gradient of any kind: nothing happens, as in torch
    w.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="our optimisers go by .g; for autograd's .grad use torch.optim"): optimizer.step()
    w.g = torch.ones(2)
    optimizer.step()
    assert w.tolist() == [-1, -1] and torch.equal(w.grad, torch.ones(2))
    optimizer.zero_grad()
    assert w.g is None and w.grad is not None


@pytest.mark.parametrize("name, options", KINDS)
def test_resuming_is_bit_identical(name, options):
    ours, theirs, optimizer, _ = pair(name, options, torch.float32)
    twins = [p.clone() for p in ours]
    for t in range(20):
        if t in (0, 7):
            second = getattr(optim, name)([{"params": twins[:2]}, {"params": twins[2:]}])
            second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        give_grads(ours, theirs, t)
        for p, q in zip(ours, twins): q.g = p.g
        optimizer.step(), second.step()
    assert all(map(torch.equal, ours, twins))


def test_hooks_groups_and_ones_own_rule():
    class SignDescent(optim.Optimizer):
        def __init__(self, params, lr=1e-3): super().__init__(params, dict(lr=lr))
        def update(self, params, grads, states, group):
            for p, g in zip(params, grads): p -= group["lr"] * g.sign()

    a, b, frozen = torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([4.0])
    optimizer, seen = SignDescent([a, frozen], lr=0.1), []
    optimizer.add_param_group({"params": [b], "lr": 0.5})
    optimizer.register_step_post_hook(lambda *args: seen.append(1))
    a.g, b.g = torch.tensor([1000.0, -0.001]), torch.tensor([5.0])
    optimizer.step()
    assert_close([a, b, frozen], [torch.tensor([0.9, 2.1]), torch.tensor([2.5]), torch.tensor([4.0])])
    assert seen == [1] and isinstance(optimizer, torch.optim.Optimizer)


# ---- schedules

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3), "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4), "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9), "PolynomialLR": lr_scheduler.PolynomialLR,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 4), "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, 20),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [3]),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_torchs_schedulers_run_on_ours(name):
    ours, theirs, optimizer, reference = pair("SGD", dict(momentum=0.9))
    schedulers = SCHEDULERS[name](optimizer), SCHEDULERS[name](reference)
    for t in range(12):
        give_grads(ours, theirs, t)
        optimizer.step(), reference.step()
        for scheduler in schedulers: scheduler.step()
        for a, b in zip(optimizer.param_groups, reference.param_groups): assert (a["lr"], a["momentum"]) == (b["lr"], b["momentum"])
    assert_close(ours, [q.detach() for q in theirs], rtol=0, atol=1e-10)


def test_reduce_on_plateau_runs_too():
    optimizer = optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    for _ in range(4): scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_our_schedules_are_torchs_formulas():
    def torchs(make, n):
        optimizer = optim.SGD([torch.zeros(1)], lr=1.0)
        scheduler, lrs = make(optimizer), []
        for _ in range(n):
            lrs.append(optimizer.param_groups[0]["lr"])
            optimizer.step(), scheduler.step()
        return lrs

    n = 40
    assert [optim.cosine(t / n) for t in range(n)] == pytest.approx(torchs(lambda o: lr_scheduler.CosineAnnealingLR(o, n), n))
    linear = torchs(lambda o: lr_scheduler.LinearLR(o, 1.0, 0.25, n), n)
    assert [optim.linear(t / n, 1.0, 0.25) for t in range(n)] == pytest.approx(linear)
    one_cycle = torchs(lambda o: lr_scheduler.OneCycleLR(o, 1.0, 101, pct_start=31 / 101), 101)  # its peak is step 30, its end 100
    assert [optim.one_cycle(t / 100) for t in range(101)] == pytest.approx(one_cycle, abs=1e-9)
    warm = optim.warmup(optim.cosine, 0.2, start=0.1)
    assert [warm(s) for s in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0.1, 0.55, 1, 0.5, 0])


# ---- clipping

@settings(max_examples=40, deadline=None)
@given(max_norm=st.floats(0, 100), norm_type=st.sampled_from([1.0, 2.0, 3.0, math.inf]), missing=st.booleans())
def test_clipping_is_torchs(max_norm, norm_type, missing):
    ours, theirs = [torch.randn(s) for s in SHAPES[:4]], [nn.Parameter(torch.zeros(s)) for s in SHAPES[:4]]
    for p, q in zip(ours, theirs): p.g, q.grad = p.clone(), p.clone()
    if missing: ours[0].g = theirs[0].grad = None
    norm = optim.clip_grad_norm_(iter(ours), max_norm, norm_type)
    assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type))
    for p, q in zip(ours, theirs): assert p.g is q.grad is None or torch.allclose(p.g, q.grad)


def test_clipping_nothing(): assert optim.clip_grad_norm_([torch.ones(2)], 1.0) == 0


# ---- the finder

def digits_like():
    model = layers.Model(layers.Sequential(layers.Linear(4, 8), layers.ReLU(), layers.Linear(8, 3)), layers.CrossEntropyLoss())
    x = torch.randn(64, 4)
    return model, [(x[i:i + 16], x[i:i + 16].argmax(1) % 3) for i in range(0, 64, 16)]


def test_the_finder_leaves_no_trace():
    model, batches = digits_like()
    optimizer = optim.Adam(model.parameters(), lr=0.123)
    model(*batches[0])
    model.backward()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict())), [p.g for p in model.parameters()], torch.get_rng_state()
    found = optim.lr_find(optimizer, model, batches)
    assert_close((model.state_dict(), optimizer.state_dict()), before[0])
    assert all(p.g is g for p, g in zip(model.parameters(), before[1])) and torch.equal(torch.get_rng_state(), before[2])
    assert found.lrs == sorted(found.lrs) and len(found.lrs) == len(found.losses) == len(found.smooth)
    assert 1e-6 < found.suggestion < 10


def test_the_finder_stops_when_the_loss_blows_up_and_begins_the_data_again():
    model, batches = digits_like()
    optimizer = optim.SGD(model.parameters())
    found = optim.lr_find(optimizer, model, batches, start_lr=1e-4, end_lr=1e8)
    assert found.lrs[-1] < 1e7 and len(found.lrs) > len(batches)
    short = optim.lr_find(optimizer, model, batches[:1], num_iter=10)
    assert len(short.lrs) == 10 and short.lrs[0] == 1e-6 and short.lrs[-1] == pytest.approx(10)
    import matplotlib.pyplot as plt
    assert found.plot().get_xscale() == "log"
    plt.close("all")
