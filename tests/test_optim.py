"""Optimisers, schedules, clipping and the learning-rate finder: every option against torch, and what must not change."""
import copy
import inspect
import itertools
import math
import pickle
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from fromfound import layers, optim

product = itertools.product
SHAPES = [(3, 4), (5,), (), (2, 1, 3), (0, 2)]


def options(**choices):
    return [dict(zip(choices, values)) for values in product(*choices.values())]


CASES = [("SGD", o) for o in options(momentum=[0, 0.9], dampening=[0, 0.3, -0.5], weight_decay=[0, 0.1], nesterov=[False, True],
                                     maximize=[False, True]) if not o["nesterov"] or (o["momentum"] and o["dampening"] == 0)]
CASES += [("RMSprop", o) for o in options(alpha=[0.99, 0.0], eps=[1e-8, 0.1], weight_decay=[0, 0.1], momentum=[0, 0.9],
                                          centered=[False, True], maximize=[False, True])]
CASES += [(name, o) for name in ("Adam", "AdamW") for o in options(
    betas=[(0.9, 0.999), (0.0, 0.5)], eps=[1e-8, 0.1], weight_decay=[0, 0.1], amsgrad=[False, True], maximize=[False, True])]
NEW = {"decoupled_weight_decay"} - inspect.signature(torch.optim.Adam).parameters.keys()  # what older PyTorch does not have yet
if not NEW: CASES += [("Adam", dict(decoupled_weight_decay=True, weight_decay=0.1))]
IDS = [f"{name}-{'-'.join(map(str, o.values()))}" for name, o in CASES]


def pair(name, options, dtype=torch.float64, shapes=SHAPES, requires_grad=False):
    "Ours and torch's optimiser on equal parameters, in two groups with different lr and weight decay."
    ours = [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    groups = lambda params: [{"params": params[:2]}, {"params": params[2:], "lr": 0.02, "weight_decay": 0.05}]
    return ours, theirs, getattr(optim, name)(groups(ours), lr=0.05, **options), getattr(torch.optim, name)(groups(theirs), lr=0.05, **options)


def give_grads(ours, theirs, t, scale=1.0):
    for i, (p, q) in enumerate(zip(ours, theirs)):
        p.g = None if (t + i) % 4 == 0 else scale * torch.randn_like(p)  # now and then one is missing
        q.grad = None if p.g is None else p.g.clone()


def assert_same_state(a, b):
    "Two state dicts hold the same: names, types, dtypes, values. torch's own switches are left out."
    assert a["state"].keys() == b["state"].keys()
    for i in a["state"]:
        assert a["state"][i].keys() == b["state"][i].keys()
        for name, value in b["state"][i].items(): assert_close(a["state"][i][name], value, rtol=1e-12, atol=1e-12, equal_nan=True)
    for ga, gb in zip(a["param_groups"], b["param_groups"]):
        assert {k: v for k, v in ga.items() if k in gb or k not in NEW} == {k: v for k, v in gb.items() if k in ga}
        assert gb.keys() - ga.keys() <= {"foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}


@pytest.mark.parametrize("name, options", CASES, ids=IDS)
def test_numbers_and_state_are_torchs(name, options):
    torch.manual_seed(0)
    ours, theirs, optimizer, reference = pair(name, options)
    for t in range(12):
        give_grads(ours, theirs, t)
        grads = [None if p.g is None else p.g.clone() for p in ours]
        optimizer.step()
        reference.step()
        assert_close(ours, [q.detach() for q in theirs], rtol=0, atol=1e-10, equal_nan=True)
        assert all(g is None or torch.equal(g, p.g) for g, p in zip(grads, ours)), "a gradient was changed"
        assert_same_state(optimizer.state_dict(), reference.state_dict())
        if t == 5:  # go on with fresh optimisers: ours from torch's state, torch's from ours
            saved, theirs_saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(reference.state_dict())
            groups = [{"params": g["params"]} for g in optimizer.param_groups]
            kind = {k: v for k, v in options.items() if k == "decoupled_weight_decay"}  # all other options come from the state
            optimizer = getattr(optim, name)(groups, **kind)
            optimizer.load_state_dict(theirs_saved)
            reference = getattr(torch.optim, name)([{"params": g["params"]} for g in reference.param_groups])
            reference.load_state_dict(saved)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("name, options", [("SGD", dict(momentum=0.9)), ("RMSprop", dict(centered=False)), ("Adam", {}), ("AdamW", {})])
def test_other_dtypes_and_parameters_of_autograd(name, options, dtype, tolerance):
    torch.manual_seed(0)
    options = {**options, "eps": 1e-3} if "eps" in inspect.signature(getattr(optim, name)).parameters else options
    ours, theirs, optimizer, reference = pair(name, options, dtype, requires_grad=True)
    ids = [(id(p), p.data_ptr()) for p in ours]
    for t in range(10):
        give_grads(ours, theirs, t)
        optimizer.step()
        reference.step()
    assert_close([p.detach() for p in ours], [q.detach() for q in theirs], rtol=tolerance, atol=tolerance)
    assert all(p.dtype == dtype and p.requires_grad and p.is_leaf for p in ours)
    assert ids == [(id(p), p.data_ptr()) for p in ours], "not in place"
    assert all(t.dtype == dtype for s in optimizer.state.values() for n, t in s.items() if n != "step")


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam", "AdamW"])
def test_mixed_dtypes_in_one_group_and_any_layout(name):
    torch.manual_seed(0)
    ours = [torch.randn(3, 4).T, torch.randn(6, dtype=torch.float64)[::2], torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    more = dict(momentum=0.9) if name == "SGD" else {}
    optimizer, reference = getattr(optim, name)(ours, lr=0.1, **more), getattr(torch.optim, name)(theirs, lr=0.1, **more)
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.g = torch.randn(p.shape, dtype=p.dtype)
            q.grad = p.g.clone()
        optimizer.step()
        reference.step()
    for p, q in zip(ours, theirs): assert_close(p, q.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name, options", [("SGD", dict(momentum=0.9, weight_decay=0.1)), ("RMSprop", dict(momentum=0.9)), ("Adam", {}),
                                           ("AdamW", dict(amsgrad=True))])
def test_what_is_not_finite_goes_through_as_in_torch(name, options, bad):
    torch.manual_seed(0)
    ours, theirs, optimizer, reference = pair(name, options, torch.float32, [(4,), (2, 2)])
    for t in range(8):
        for p, q in zip(ours, theirs):
            p.g = torch.randn_like(p)
            if t == 2: p.g.view(-1)[1] = bad
            q.grad = p.g.clone()
        optimizer.step()
        reference.step()
        assert_close(ours, [q.detach() for q in theirs], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam", "AdamW"])
def test_signature_is_torchs_without_what_is_not_built(name):
    switches = {"foreach", "fused", "capturable", "differentiable"}
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (optim, torch.optim))
    wanted = [(p.name, p.default) for p in theirs.values() if p.name not in switches]
    assert [(p.name, p.default) for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        w for w in wanted if theirs[w[0]].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and w[0] != "maximize"]
    assert {(p.name, p.default) for p in ours.values() if p.name not in NEW} == set(wanted)
    for switch in switches:
        with pytest.raises(TypeError, match=switch): getattr(optim, name)([torch.zeros(1)], **{switch: True})


BAD = [(TypeError, dict(lr="0.1")), (TypeError, dict(lr=None)), (TypeError, dict(lr=True)), (NotImplementedError, dict(lr=torch.tensor(0.1)))]
BAD += [(ValueError, dict(lr=v)) for v in (-1, math.nan, math.inf, -math.inf)]
BAD += [(ValueError, dict(weight_decay=v)) for v in (-0.1, math.nan, math.inf)]


@pytest.mark.parametrize("name, error, bad", [(n, *b) for n in ("SGD", "RMSprop", "Adam", "AdamW") for b in BAD] + [
    ("SGD", ValueError, o) for o in (dict(momentum=-0.1), dict(momentum=math.nan), dict(nesterov=True), dict(dampening=math.nan),
                                     dict(nesterov=True, momentum=0.9, dampening=0.1))] + [
    ("RMSprop", ValueError, o) for o in (dict(alpha=-0.1), dict(alpha=1.0), dict(eps=-1), dict(momentum=-1), dict(eps=math.nan))] + [
    (n, ValueError, o) for n in ("Adam", "AdamW") for o in (dict(betas=(1.0, 0.9)), dict(betas=(0.9, 1.0)), dict(betas=(-0.1, 0.9)), dict(eps=-1),
                                                           dict(betas=(0.9,)), dict(betas=0.9), dict(betas=(math.nan, 0.9)), dict(betas="ab"[:1]))])
def test_bad_options(name, error, bad):
    with pytest.raises(error): getattr(optim, name)([torch.zeros(2)], **bad)
    good = getattr(optim, name)([torch.zeros(2)])
    with pytest.raises(error): good.add_param_group({"params": [torch.zeros(3)], **bad})
    assert len(good.param_groups) == 1


def test_bad_parameters():
    p = torch.zeros(2)
    for empty in ([], (), iter([]), {}.values()):
        with pytest.raises(ValueError, match="no parameters"): optim.SGD(empty)
    used = layers.Linear(2, 2).parameters()
    list(used)
    with pytest.raises(ValueError, match="generator"): optim.SGD(used)
    for wrong in (p, [1.0], [[p]], [None], [("name", p)], [p.numpy()], {"params": [p]}, {p}, [{"params": {p}}], [{"lr": 1}], [p, {"params": [p]}]):
        with pytest.raises(TypeError): optim.SGD(wrong)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match="floating"): optim.SGD([torch.zeros(2, dtype=dtype)])
    for twice in ([p, p], [{"params": [p]}, {"params": [p]}], [{"params": [p, p]}]):
        with pytest.raises(ValueError, match="twice"): optim.Adam(twice)
    with pytest.raises(ValueError, match="computed"): optim.Adam([torch.zeros(2, requires_grad=True) * 2])
    with pytest.raises(NotImplementedError, match="fused"): optim.Adam([{"params": [p], "fused": True}])
    optim.Adam([{"params": [p], "fused": None, "foreach": False}])
    with pytest.raises(ValueError, match="momentun"): optim.SGD([{"params": [p], "momentun": 0.9}])
    assert len(optim.SGD([{"params": []}, {"params": p, "name": "one"}]).param_groups) == 2
    with pytest.raises(NotImplementedError, match="no update"):
        q = torch.zeros(2)
        q.g = torch.ones(2)
        optim.Optimizer([q], {}).step()


def test_the_group_that_is_given_is_not_changed():
    p, given = torch.zeros(2), {"params": iter([torch.zeros(1)]), "lr": 1.0}
    keys = list(given)
    optimizer = optim.SGD([p], lr=0.1)
    optimizer.add_param_group(given)
    assert list(given) == keys and optimizer.param_groups[1]["lr"] == 1.0 and optimizer.param_groups[1]["momentum"] == 0
    assert "1.0" in repr(optimizer) and repr(optimizer).startswith("SGD (")


@pytest.mark.parametrize("error, make", [
    (ValueError, lambda p: torch.zeros(3)), (ValueError, lambda p: torch.zeros(1)), (ValueError, lambda p: torch.zeros(())),
    (ValueError, lambda p: torch.zeros(2, 1)), (TypeError, lambda p: torch.zeros(2, dtype=torch.float64)), (TypeError, lambda p: [0.0, 0.0]),
    (TypeError, lambda p: 0.0), (TypeError, lambda p: torch.zeros(2, device="meta")), (NotImplementedError, lambda p: torch.zeros(2).to_sparse()),
    (TypeError, lambda p: torch.zeros(2, dtype=torch.int64))])
@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam", "AdamW"])
def test_a_wrong_gradient_raises_before_anything_moves(name, error, make):
    params = [torch.ones(2) for _ in range(3)]
    optimizer = getattr(optim, name)([{"params": params[:2]}, {"params": params[2:]}], **(dict(momentum=0.9) if name == "SGD" else {}))
    for p in params: p.g = torch.ones(2)
    optimizer.step()
    before, state = [p.clone() for p in params], copy.deepcopy(optimizer.state_dict())
    params[2].g = make(params[2])
    with pytest.raises(error): optimizer.step()
    with pytest.raises(error): optim.clip_grad_norm_(params, 0.1)
    with pytest.raises(error): optim.clip_grad_value_(params, 0.1)
    assert all(map(torch.equal, params, before)) and all(torch.equal(p.g, torch.ones(2)) for p in params[:2])
    assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)


def test_parameters_without_a_gradient_are_left_alone():
    a, b = torch.ones(2), torch.ones(2)
    optimizer = optim.AdamW([a, b], weight_decay=0.5)
    optimizer.step()  # neither has one: not even an attribute
    a.g = torch.ones(2)
    b.g = None
    optimizer.step()
    assert torch.equal(b, torch.ones(2)) and not torch.equal(a, b)
    assert list(optimizer.state_dict()["state"]) == [0]
    optimizer.zero_grad()
    assert a.g is None and b.g is None


def trained(name, steps=3, **options):
    torch.manual_seed(0)
    params = [torch.randn(2, 3), torch.randn(4)]
    optimizer = getattr(optim, name)(params, **options)
    for _ in range(steps):
        for p in params: p.g = torch.randn_like(p)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("name, options", [("SGD", dict(momentum=0.9)), ("SGD", {}), ("RMSprop", dict(momentum=0.5, centered=True)), ("Adam", {}),
                                           ("AdamW", dict(amsgrad=True))])
@pytest.mark.parametrize("how", ["deepcopy of the state", "pickle of the state", "deepcopy of both"])
def test_going_on_is_bit_identical(name, options, how):
    params, optimizer = trained(name, **options)
    if how == "deepcopy of both":
        params2, optimizer2 = copy.deepcopy((params, optimizer))
    else:
        params2 = [p.clone() for p in params]
        optimizer2 = getattr(optim, name)(params2)
        state = optimizer.state_dict()
        optimizer2.load_state_dict(copy.deepcopy(state) if how.startswith("deep") else pickle.loads(pickle.dumps(state)))
    for _ in range(4):
        for p, q in zip(params, params2): p.g = q.g = torch.randn_like(p)
        optimizer.step()
        optimizer2.step()
        assert all(map(torch.equal, params, params2))


def test_loading_copies():
    params, optimizer = trained("Adam")
    state = optimizer.state_dict()
    other = optim.Adam([p.clone() for p in params])
    other.load_state_dict(state)
    mine, yours = ({t.data_ptr() for s in o.state.values() for t in s.values()} for o in (optimizer, other))
    assert not mine & yours and other.param_groups[0] is not state["param_groups"][0]
    other.load_state_dict(other.state_dict())  # its own state


def spoil(state, what):
    state = copy.deepcopy(state)
    group, one = state["param_groups"][0], state["state"].get(0)
    if what == "no state": del state["state"]
    if what == "no groups": state["param_groups"] = []
    if what == "a group too many": state["param_groups"].append(copy.deepcopy(group))
    if what == "a parameter too few": group["params"].pop()
    if what == "a number twice": group["params"] = [0, 0]
    if what == "an unknown number": state["state"][7] = one
    if what == "no lr": del group["lr"]
    if what == "a bad lr": group["lr"] = math.nan
    if what == "a bad beta": group["betas"] = (0.9, 2.0)
    if what == "another shape": one["exp_avg"] = torch.zeros(3, 2)
    if what == "no tensor": one["exp_avg"] = [0.0]
    if what == "a bad step": one["step"] = torch.tensor(math.nan)
    if what == "a step for each": one["step"] = torch.ones(2)
    if what == "a name missing": del one["exp_avg_sq"]
    if what == "an unknown name": one["momentum_buffer"] = one["exp_avg"]
    if what == "the other decay": group["decoupled_weight_decay"] = True
    return state


@pytest.mark.parametrize("what", ["no state", "no groups", "a group too many", "a parameter too few", "a number twice", "an unknown number", "no lr",
                                  "a bad lr", "a bad beta", "another shape", "no tensor", "a bad step", "a step for each", "a name missing",
                                  "an unknown name", "the other decay"])
def test_a_spoilt_state_is_refused_and_changes_nothing(what):
    params, optimizer = trained("Adam", weight_decay=0.1)
    before, groups = copy.deepcopy(optimizer.state_dict()), optimizer.param_groups
    with pytest.raises((ValueError, TypeError, RuntimeError)): optimizer.load_state_dict(spoil(before, what))
    assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"] and optimizer.param_groups is groups


def test_states_of_other_optimisers_are_refused():
    names = ["SGD", "RMSprop", "Adam"]
    for one, other in itertools.permutations(names, 2):
        params, optimizer = trained(one, **(dict(momentum=0.9) if one == "SGD" else {}))
        with pytest.raises(ValueError): getattr(optim, other)(params).load_state_dict(optimizer.state_dict())
    for not_one in (None, [], 3, {}, {"state": {}}):
        with pytest.raises(ValueError): optimizer.load_state_dict(not_one)


def test_torchs_switches_and_older_states_load():
    params = [nn.Parameter(torch.randn(3))]
    reference = torch.optim.AdamW(params, lr=0.3, foreach=True)
    params[0].grad = torch.randn(3)
    reference.step()
    state = copy.deepcopy(reference.state_dict())
    ours = optim.AdamW([torch.zeros(3)])
    ours.load_state_dict(state)
    assert "foreach" not in ours.param_groups[0] and ours.param_groups[0]["lr"] == 0.3
    state["param_groups"][0].pop("decoupled_weight_decay", None)
    state["state"][0]["step"] = 1  # as it was once
    state["param_groups"][0]["betas"] = [0.8, 0.9]  # as JSON has it
    ours.load_state_dict(state)
    assert ours.param_groups[0]["decoupled_weight_decay"] and ours.param_groups[0]["betas"] == (0.8, 0.9)
    assert isinstance(ours.state_dict()["state"][0]["step"], torch.Tensor)


def test_a_state_takes_the_parameters_dtype():
    params, optimizer = trained("Adam")
    other = optim.Adam([p.double() for p in params])
    other.load_state_dict(optimizer.state_dict())
    assert all(t.dtype == (torch.float32 if n == "step" else torch.float64) for s in other.state.values() for n, t in s.items())


def test_steps_inside_inference_mode_leave_ordinary_states():
    p = torch.ones(3)
    optimizer = optim.Adam([p])
    with torch.inference_mode():
        p.g = torch.ones(3)
        optimizer.step()
    p.g = torch.ones(3)
    optimizer.step()  # a state made in inference mode could not be changed here
    for cls in (optim.SGD, optim.RMSprop):
        optimizer = cls([p], momentum=0.9)
        with torch.inference_mode():
            p.g = torch.ones(3)
            optimizer.step()
        optimizer.step()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["SGD", "RMSprop", "Adam", "AdamW"]), st.floats(0, 2), st.floats(0, 0.99), st.floats(0, 1))
def test_any_options_are_torchs(seed, name, lr, share, weight_decay):
    torch.manual_seed(seed)
    more = {"SGD": dict(momentum=share), "RMSprop": dict(alpha=share, momentum=share / 2)}.get(name, dict(betas=(share, share**0.5)))
    p = torch.randn(5, dtype=torch.float64)
    q = nn.Parameter(p.clone())
    optimizer = getattr(optim, name)([p], lr=lr, weight_decay=weight_decay, **more)
    reference = getattr(torch.optim, name)([q], lr=lr, weight_decay=weight_decay, **more)
    for _ in range(5):
        p.g = torch.randn_like(p)
        q.grad = p.g.clone()
        optimizer.step()
        reference.step()
    assert_close(p, q.detach(), rtol=1e-9, atol=1e-10)


# Schedules


def two_groups(module, cls="SGD", **more):
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    return getattr(module, cls)([{"params": params[:1]}, {"params": params[1:], "lr": 0.03}], lr=0.1, **more)


def look(optimizer):
    return [v for g in optimizer.param_groups for v in (g["lr"], g["momentum"] if "momentum" in g else g["betas"][0])]


SCHEDULES = {f"ConstantLR {o}": ("ConstantLR", o) for o in options(factor=[1 / 3, 0.5, 1.0], total_iters=[1, 5, 100])}
SCHEDULES |= {f"StepLR {o}": ("StepLR", o) for o in options(step_size=[1, 7, 100], gamma=[0.1, 0.9, 1.0])}
SCHEDULES |= {f"LinearLR {o}": ("LinearLR", o) for o in options(start_factor=[1 / 3, 0.01, 1.0], end_factor=[1.0, 0.5, 0.0], total_iters=[1, 5, 40, 100])}
SCHEDULES |= {f"CosineAnnealingLR {o}": ("CosineAnnealingLR", o) for o in options(T_max=[1, 2, 7, 40, 100], eta_min=[0.0, 0.01])}
SCHEDULES |= {f"LambdaLR {k}": ("LambdaLR", dict(lr_lambda=f)) for k, f in
              [("one", lambda t: 0.9**t), ("two", [lambda t: 0.9**t, lambda t: 1 / (t + 1)])]}
SCHEDULES |= {f"OneCycleLR {o}": ("OneCycleLR", dict(max_lr=[0.5, 0.1], **o)) for o in options(
    total_steps=[40, 60], pct_start=[0.3, 0.5, 0.1], anneal_strategy=["cos", "linear"], cycle_momentum=[True, False], three_phase=[False, True])}
SCHEDULES |= {"OneCycleLR epochs": ("OneCycleLR", dict(max_lr=0.2, epochs=4, steps_per_epoch=10, base_momentum=[0.5, 0.6], max_momentum=0.99,
                                                      div_factor=10, final_div_factor=100))}


@pytest.mark.parametrize("cls", ["SGD", "RMSprop", "AdamW"])
@pytest.mark.parametrize("what", SCHEDULES)
def test_schedules_are_torchs(what, cls):
    name, arguments = SCHEDULES[what]
    ours, theirs = two_groups(optim, cls), two_groups(torch.optim, cls)
    own, reference = getattr(optim, name)(ours, **arguments), getattr(torch.optim.lr_scheduler, name)(theirs, **arguments)
    for t in range(41):
        assert look(ours) == pytest.approx(look(theirs), rel=1e-9, abs=1e-15), t
        assert own.get_last_lr() == pytest.approx(reference.get_last_lr(), rel=1e-9, abs=1e-15) == [g["lr"] for g in ours.param_groups]
        assert own.last_epoch == reference.last_epoch == t
        theirs.step()
        if t == 40: break
        own.step()
        reference.step()
        if t == 17:  # go on with a fresh optimiser and a fresh schedule
            optimizer_state, state = pickle.loads(pickle.dumps((ours.state_dict(), own.state_dict())))
            ours = two_groups(optim, cls)
            own = getattr(optim, name)(ours, **arguments)
            own.load_state_dict(state)
            assert look(ours) == pytest.approx(look(theirs), rel=1e-9, abs=1e-15)
            ours.load_state_dict(optimizer_state)


@pytest.mark.parametrize("name", ["ConstantLR", "StepLR", "LinearLR", "CosineAnnealingLR"])
def test_torchs_schedule_states_load(name):
    arguments = {"StepLR": dict(step_size=7), "CosineAnnealingLR": dict(T_max=30)}.get(name, dict(total_iters=9))
    theirs, ours = two_groups(torch.optim), two_groups(optim)
    reference, own = getattr(torch.optim.lr_scheduler, name)(theirs, **arguments), getattr(optim, name)(ours, **{k: 3 for k in arguments})
    for t in range(20):
        theirs.step()
        reference.step()
        own.load_state_dict(reference.state_dict())
        assert look(ours) == pytest.approx(look(theirs), rel=1e-9)


SEQUENCES = {
    "warm-up, cosine": lambda m, o: ([m.LinearLR(o, 0.1, total_iters=5), m.CosineAnnealingLR(o, 20, 0.001)], [5]),
    "constant, step": lambda m, o: ([m.ConstantLR(o, 0.5, 3), m.StepLR(o, 4, 0.5)], [7]),
    "step, linear, cosine": lambda m, o: ([m.StepLR(o, 2, 0.5), m.LinearLR(o, 0.2, 0.8, 4), m.CosineAnnealingLR(o, 9)], [6, 15]),
    "lambda, lambda": lambda m, o: ([m.LambdaLR(o, lambda t: 0.9**t), m.LambdaLR(o, lambda t: 0.5**t)], [10]),
    "one alone": lambda m, o: ([m.StepLR(o, 3)], []),
}


@pytest.mark.parametrize("what", SEQUENCES)
def test_sequences_are_torchs(what):
    ours, theirs = two_groups(optim), two_groups(torch.optim)
    own = optim.SequentialLR(ours, *SEQUENCES[what](optim, ours))
    reference = torch.optim.lr_scheduler.SequentialLR(theirs, *SEQUENCES[what](torch.optim.lr_scheduler, theirs))
    for t in range(30):
        assert [g["lr"] for g in ours.param_groups] == pytest.approx([g["lr"] for g in theirs.param_groups], rel=1e-9, abs=1e-15), t
        assert own.get_last_lr() == pytest.approx(reference.get_last_lr(), rel=1e-9, abs=1e-15)
        theirs.step()
        own.step()
        reference.step()
        if t == 12:
            state = pickle.loads(pickle.dumps(own.state_dict()))
            ours = two_groups(optim)
            own = optim.SequentialLR(ours, *SEQUENCES[what](optim, ours))
            own.load_state_dict(state)


def test_schedules_begin_anywhere():
    for t in (0, 3, 30):
        optimizer = two_groups(optim)
        for group in optimizer.param_groups: group["initial_lr"] = group["lr"]
        schedule = optim.CosineAnnealingLR(optimizer, 40, last_epoch=t - 1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * (1 + math.cos(math.pi * t / 40)) / 2) and schedule.last_epoch == t
    with pytest.raises(ValueError, match="initial_lr"): optim.StepLR(two_groups(optim), 3, last_epoch=2)


@pytest.mark.parametrize("bad", [
    lambda o: optim.StepLR(o, 0), lambda o: optim.StepLR(o, 2.5), lambda o: optim.StepLR(o, 3, gamma=-1), lambda o: optim.StepLR(o, 3, gamma=math.nan),
    lambda o: optim.ConstantLR(o, factor=1.5), lambda o: optim.ConstantLR(o, factor=-0.1), lambda o: optim.ConstantLR(o, total_iters=0),
    lambda o: optim.LinearLR(o, start_factor=0), lambda o: optim.LinearLR(o, start_factor=1.1), lambda o: optim.LinearLR(o, end_factor=-0.1),
    lambda o: optim.LinearLR(o, total_iters=0), lambda o: optim.CosineAnnealingLR(o, 0), lambda o: optim.CosineAnnealingLR(o, -3),
    lambda o: optim.CosineAnnealingLR(o, 5, eta_min=-1), lambda o: optim.LambdaLR(o, [lambda t: 1]), lambda o: optim.OneCycleLR(o, 0.1),
    lambda o: optim.OneCycleLR(o, 0.1, total_steps=0), lambda o: optim.OneCycleLR(o, 0.1, epochs=3), lambda o: optim.OneCycleLR(o, -0.1, 10),
    lambda o: optim.OneCycleLR(o, 0.1, 10, pct_start=1.5), lambda o: optim.OneCycleLR(o, 0.1, 10, anneal_strategy="sin"),
    lambda o: optim.OneCycleLR(o, [0.1], 10), lambda o: optim.OneCycleLR(o, 0.1, 10, div_factor=0), lambda o: optim.LambdaLR(o, lambda t: math.nan),
    lambda o: optim.OneCycleLR(o, 0.1, 10, base_momentum=[0.1]), lambda o: optim.SequentialLR(o, [], []),
    lambda o: optim.SequentialLR(o, [optim.StepLR(two_groups(optim), 3)], []),
])
def test_bad_schedules_touch_nothing(bad):
    optimizer = two_groups(optim)
    before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    with pytest.raises(ValueError): bad(optimizer)
    after = [{k: v for k, v in g.items() if k not in ("params", "initial_lr")} for g in optimizer.param_groups]
    assert after == before


def test_more_of_what_schedules_refuse():
    optimizer = two_groups(optim)
    for make in (lambda o: optim.StepLR(o, 3), lambda o: optim.LambdaLR(o, lambda t: 1), lambda o: optim.OneCycleLR(o, 0.1, 10)):
        for wrong in (None, torch.optim.SGD([nn.Parameter(torch.zeros(1))]), []):
            with pytest.raises(TypeError): make(wrong)
    parts = [optim.StepLR(optimizer, 3), optim.StepLR(optimizer, 4), optim.StepLR(optimizer, 5)]
    for milestones in ([], [3], [5, 3], [0, 3], [3, 3], [-1, 2]):
        with pytest.raises(ValueError): optim.SequentialLR(optimizer, parts, milestones)

    class NoMomentum(optim.Optimizer):
        def __init__(self, params): super().__init__(params, dict(lr=0.1))
    plain = NoMomentum([torch.zeros(1)])
    with pytest.raises(ValueError, match="cycle_momentum"): optim.OneCycleLR(plain, 0.1, 10)
    optim.OneCycleLR(plain, 0.1, 10, cycle_momentum=False)
    cycle = optim.OneCycleLR(optimizer, 0.1, 5)
    for _ in range(5): cycle.step()
    lrs = look(optimizer)
    with pytest.raises(ValueError, match="5 steps"): cycle.step()
    assert look(optimizer) == lrs and cycle.last_epoch == 5
    schedule = optim.StepLR(plain, 2)
    plain.add_param_group({"params": torch.zeros(2)})
    with pytest.raises(ValueError, match="groups"): schedule.step()
    assert schedule.last_epoch == 0


@pytest.mark.parametrize("spoilt", [{}, None, {"last_epoch": 3}, "bad epoch", "bad base", "nan"])
def test_a_spoilt_schedule_state_changes_nothing(spoilt):
    optimizer = two_groups(optim)
    schedule = optim.SequentialLR(optimizer, [optim.LinearLR(optimizer), optim.CosineAnnealingLR(optimizer, 9)], [5])
    for _ in range(7): schedule.step()
    before, lrs = schedule.state_dict(), look(optimizer)
    state = copy.deepcopy(before)
    if spoilt == "bad epoch": state["last_epoch"] = -3
    if spoilt == "bad base": state["_schedulers"][1]["base_lrs"] = [0.1]
    if spoilt == "nan": state["_schedulers"][1]["eta_min"] = math.nan
    with pytest.raises((ValueError, TypeError)): schedule.load_state_dict(state if isinstance(spoilt, str) else spoilt)
    assert schedule.state_dict() == before and look(optimizer) == lrs


# Clipping


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 3, 1e3])
@pytest.mark.parametrize("norm_type", [1, 2.0, 3.5, math.inf, "inf"])
def test_clipping_by_norm_is_torchs(max_norm, norm_type):
    torch.manual_seed(0)
    for case in ("plain", "one missing", "mixed dtypes", "zeros", "inf", "nan", "none at all"):
        ours = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4).to(torch.float64 if case == "mixed dtypes" else torch.float32))]
        for i, p in enumerate(ours):
            if case == "none at all" or (case == "one missing" and i == 0): continue
            p.g = torch.zeros_like(p) if case == "zeros" else torch.randn_like(p).detach()
            if case in ("inf", "nan") and i: p.g[0] = float(case)
            p.grad = p.g.clone()
        grads = [getattr(p, "g", None) for p in ours]
        norm = optim.clip_grad_norm_(iter(ours), max_norm, norm_type)
        assert_close(norm, torch.nn.utils.clip_grad_norm_(ours, max_norm, norm_type), equal_nan=True)
        assert all(getattr(p, "g", None) is g for p, g in zip(ours, grads)), "not in place"
        for p in ours:
            if p.grad is not None: assert_close(p.g, p.grad, equal_nan=True)


def test_clipping_refuses():
    p = torch.zeros(2)
    p.g = torch.tensor([math.nan, 1.0])
    with pytest.raises(RuntimeError, match="nan"): optim.clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    assert p.g[1] == 1
    for bad in (-1, math.nan, math.inf):
        with pytest.raises(ValueError): optim.clip_grad_norm_(p, bad)
        with pytest.raises(ValueError): optim.clip_grad_value_(p, bad)
    for bad in (0, -1, math.nan):
        with pytest.raises(ValueError): optim.clip_grad_norm_(p, 1.0, norm_type=bad)
    for bad in ([1.0], [None], [p, "p"]):
        with pytest.raises(TypeError): optim.clip_grad_norm_(bad, 1.0)
    assert optim.clip_grad_norm_([], 1.0) == 0
    p.g = torch.tensor([-3.0, 0.5])
    assert optim.clip_grad_value_([p, torch.zeros(1)], 1) is None
    assert p.g.tolist() == [-1.0, 0.5]


# The learning-rate finder


class Noisy(layers.Module):
    "A layer with everything that a search may disturb: random numbers, a buffer, and a parameter that is not trained."

    def __init__(self):
        self.linear, self.frozen = layers.Linear(4, 3), nn.Parameter(torch.zeros(3), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear.forward(x) + self.frozen + 0.01 * torch.randn(len(x), 3)

    def bwd(self, out, x):
        x.g = None
        self.linear.weight.g = out.g.T @ x if self.linear.weight.g is None else self.linear.weight.g + out.g.T @ x
        if self.frozen.g is None: self.frozen.g = torch.zeros(3)
        self.frozen.g += out.g.sum(0)  # in place: a search must not let this reach the gradient that was there


def setting(seed=0):
    torch.manual_seed(seed)
    model = layers.Model(Noisy(), layers.CrossEntropyLoss())
    x = torch.randn(60, 4)
    y = x[:, :3].argmax(1)
    for p in model.parameters(): p.g = torch.ones_like(p)
    optimizer = optim.Adam([{"params": [model.net.linear.weight]}, {"params": [model.net.linear.bias], "lr": 0.5}], lr=0.01)
    optimizer.step()
    return model, optimizer, list(zip(x.split(20), y.split(20)))


class Failing(list):
    "Batches that fail in the second round."
    rounds = 0

    def __iter__(self):
        self.rounds += 1
        if self.rounds == 2: raise OSError("the disk is gone")
        return super().__iter__()


@pytest.mark.parametrize("kind", ["found", "failed", "blown up"])
def test_the_finder_leaves_no_trace(kind):
    model, optimizer, data = setting()
    if kind == "failed": data = Failing(data)
    weights, state, grads = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()), [p.g for p in model.parameters()]
    values, tensors = [g.clone() for g in grads], {n: t.data_ptr() for s in optimizer.state.values() for n, t in s.items()}
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    if kind == "failed":
        with pytest.raises(OSError): optim.lr_find(optimizer, model, data)
    else:
        optim.lr_find(optimizer, model, data, **(dict(start_lr=1.0, end_lr=1e30) if kind == "blown up" else {}))
    assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    assert tensors == {n: t.data_ptr() for s in optimizer.state.values() for n, t in s.items()}
    assert all(p.g is g and torch.equal(g, v) for p, g, v in zip(model.parameters(), grads, values))
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    with pytest.raises(RuntimeError): model.backward()  # no call is left over


def test_the_finder_winds_back_the_generator_of_the_data():
    class Loader:
        def __init__(self): self.generator = torch.Generator().manual_seed(3)
        def __iter__(self): return iter([(torch.randn(5, 4, generator=self.generator), torch.zeros(5, dtype=torch.int64))])
    model, optimizer, _ = setting()
    loader = Loader()
    before = loader.generator.get_state()
    first, second = optim.lr_find(optimizer, model, loader, num_iter=20), optim.lr_find(optimizer, model, loader, num_iter=20)
    assert torch.equal(loader.generator.get_state(), before) and first == second


def test_what_the_finder_finds():
    model, optimizer, data = setting()
    lrs, losses, suggestion = optim.lr_find(optimizer, model, data, start_lr=1e-5, end_lr=10, num_iter=80)
    assert len(lrs) == len(losses) <= 80 and lrs[0] == 1e-5 and all(math.isfinite(x) for x in losses)
    assert [b / a for a, b in zip(lrs, lrs[1:])] == pytest.approx([1e6 ** (1 / 79)] * (len(lrs) - 1))
    assert 1e-4 < suggestion <= 1
    w = torch.tensor([3.0])

    def bowl():
        w.g = 2 * w
        return w.square().sum()
    found = optim.lr_find(optim.SGD([w]), bowl, start_lr=1e-3, end_lr=1e3, num_iter=200)
    assert w.item() == 3 and 0.02 < found.suggestion < 1 and found.lrs[-1] < 100, "stops when the loss blows up"

    def rising():
        w.g = -w
        return w.square().sum()
    assert optim.lr_find(optim.SGD([w]), rising).suggestion is None
    assert optim.lr_find(optim.SGD([w]), lambda: math.nan) == ([], [], None)
    for bad in (dict(start_lr=0), dict(start_lr=1, end_lr=0.5), dict(num_iter=1), dict(end_lr=math.inf)):
        with pytest.raises(ValueError): optim.lr_find(optim.SGD([w]), bowl, **bad)
    for empty in ([], iter(data)):
        with pytest.raises(ValueError, match="ended"): optim.lr_find(optimizer, model, empty)
    import matplotlib.pyplot as plt
    assert found.plot().get_xscale() == "log"
    plt.close("all")
