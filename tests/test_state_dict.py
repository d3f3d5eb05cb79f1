"""State dicts of fromfound.layers: in both directions with torch.nn, strict, all or nothing, in place."""
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.testing import assert_close

from fromfound.layers import CrossEntropyLoss, Linear, Model, Module, ReLU, Sequential, Tanh, no_grad


class Ours:
    Sequential, Linear, ReLU, Tanh, Module = Sequential, Linear, ReLU, Tanh, Module


def build(lib, tied=True, dtype=None):
    inner = lib.Sequential(lib.Linear(6, 6, dtype=dtype), lib.Tanh(), lib.Linear(6, 6, bias=False, dtype=dtype))
    net = lib.Sequential(lib.Linear(4, 6, dtype=dtype), lib.ReLU(), inner, lib.Linear(6, 6, dtype=dtype), inner[0], lib.Linear(6, 2, dtype=dtype))
    if tied: net[3].weight = inner[0].weight
    return net


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_same_names_order_and_shapes_as_torch(tied):
    ours, theirs = build(Ours, tied), build(nn, tied)
    assert [(n, t.shape) for n, t in ours.state_dict().items()] == [(n, t.shape) for n, t in theirs.state_dict().items()]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert len(list(ours.parameters())) == len(list(theirs.parameters())) == (7 if not tied else 6) + 2


@pytest.mark.parametrize("tied", [True, False])
def test_both_directions(tied):
    ours, theirs, x = build(Ours, tied), build(nn, tied), torch.randn(3, 4)
    theirs.load_state_dict(ours.state_dict())
    with no_grad(): assert_close(ours(x), theirs(x).detach())
    for p in theirs.parameters(): nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    with no_grad(): assert_close(ours(x), theirs(x).detach())
    for (n, p), (m, q) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True): assert n == m and torch.equal(p, q)


def test_a_model_and_a_list_of_layers():
    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.layers = nn.Parameter(torch.ones(2)), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
            self.blocks = nn.ModuleDict({"a": nn.Linear(2, 3)})
            self.register_buffer("mean", torch.zeros(2))

    class Mine(Module):
        def __init__(self):
            self.scale, self.layers, self.blocks = Parameter(torch.ones(2)), [Linear(2, 2), Linear(2, 2)], {"a": Linear(2, 3)}
            self.register_buffer("mean", torch.zeros(2))

    mine, theirs = Mine(), Theirs()
    assert list(mine.state_dict()) == list(theirs.state_dict())
    theirs.mean += 1
    mine.load_state_dict(theirs.state_dict())
    assert mine.mean.tolist() == [1, 1]
    theirs.load_state_dict(mine.state_dict())
    assert list(Model(Sequential(Linear(2, 2)), CrossEntropyLoss()).state_dict()) == ["net.0.weight", "net.0.bias"]


def test_state_dict_shares_memory_and_carries_no_gradient():
    layer = Linear(2, 3)
    layer.weight.requires_grad_(True)
    layer.weight.g = torch.ones(3, 2)
    state = layer.state_dict()
    assert all(not t.requires_grad and not isinstance(t, Parameter) and not hasattr(t, "g") for t in state.values())
    state["weight"].zero_()
    assert not layer.weight.any()


def test_loading_is_in_place_and_keeps_identity_dtype_and_gradients():
    net = build(Ours, dtype=torch.float64)
    before = [(p, p.data_ptr(), p.dtype) for p in net.parameters()]
    for p in net.parameters(): p.g = torch.ones_like(p)
    grads = [p.g for p in net.parameters()]
    source = build(nn, dtype=torch.float32).state_dict()
    net.load_state_dict(source)
    assert [(p, p.data_ptr(), p.dtype) for p in net.parameters()] == before
    assert all(p.g is g for p, g in zip(net.parameters(), grads))
    assert_close(net[0].weight.float(), source["0.weight"])
    source["0.weight"].zero_()
    assert net[0].weight.any()  # copied, not shared


def test_loading_ones_own_state_changes_nothing():
    net = build(Ours)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    net.load_state_dict(net.state_dict())
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_parameters_that_require_grad_are_loaded():
    layer = Linear(2, 2)
    for p in layer.parameters(): p.requires_grad_(True)
    layer.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2, requires_grad=True)})
    assert layer.bias.is_leaf and layer.bias.tolist() == [1, 1] and layer.weight.requires_grad


WRONG = {
    "missing": (lambda d: d.pop("2.0.bias"), ValueError, "2.0.bias"),
    "unexpected": (lambda d: d.update(extra=torch.ones(1)), ValueError, "extra"),
    "shape": (lambda d: d.update({"5.weight": torch.zeros(6, 2)}), ValueError, r"5.weight.*\(6, 2\).*\(2, 6\)"),
    "broadcastable": (lambda d: d.update({"5.bias": torch.zeros(1)}), ValueError, "5.bias"),
    "number": (lambda d: d.update({"5.bias": 1.0}), TypeError, "5.bias"),
    "list": (lambda d: d.update({"5.bias": [1.0, 2.0]}), TypeError, "5.bias"),
    "none": (lambda d: d.update({"5.bias": None}), TypeError, "5.bias"),
    "complex": (lambda d: d.update({"5.bias": torch.zeros(2, dtype=torch.complex64)}), TypeError, "5.bias"),
    "meta": (lambda d: d.update({"5.bias": torch.zeros(2, device="meta")}), TypeError, "5.bias"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_and_nothing_changes(case):
    spoil, error, text = WRONG[case]
    net = build(Ours)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    state = OrderedDict((n, torch.randn(t.shape)) for n, t in net.state_dict().items())
    spoil(state)
    with pytest.raises(error, match=text): net.load_state_dict(state)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_everything_wrong_is_named_at_once():
    layer = Linear(2, 3)
    with pytest.raises(ValueError, match=r"bias.*wait.*weight.*\(3,\).*\(3, 2\)"): layer.load_state_dict({"weight": torch.ones(3), "wait": torch.ones(1)})


@pytest.mark.parametrize("bad", [None, [("weight", torch.ones(3, 2))], "weights.pt", nn.Linear(2, 3)])
def test_no_dict_is_a_type_error(bad):
    with pytest.raises(TypeError): Linear(2, 3).load_state_dict(bad)


def test_training_goes_on_after_loading():
    model, x, y = Model(build(Ours), CrossEntropyLoss()), torch.randn(5, 4), torch.randint(0, 2, (5,))
    model(x, y)  # waits for its way back
    weights = list(model.parameters())
    model.load_state_dict({n: torch.zeros_like(t) for n, t in model.state_dict().items()})
    model.backward()
    for p in weights: p -= 0.1 * p.g
    assert model.net[5].bias.any()


def test_buffers_are_saved_moved_and_not_trained():
    class Norm(Module):
        def __init__(self):
            self.weight = Parameter(torch.ones(3))
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("num_batches_tracked", torch.tensor(0))
            self.register_buffer("absent", None)

    theirs, ours = nn.BatchNorm1d(3, affine=True), Norm()
    ours.bias, ours.running_var = Parameter(torch.zeros(3)), torch.ones(3)
    ours.register_buffer("running_var", ours.running_var)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    theirs(torch.randn(8, 3))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.running_mean, theirs.running_mean) and ours.num_batches_tracked.item() == 1
    assert [n for n, _ in ours.named_parameters()] == ["weight", "bias"]
    ours.running_mean = torch.full((3,), 7.0)  # assigning keeps it a buffer
    theirs.load_state_dict(ours.state_dict())
    assert theirs.running_mean.tolist() == [7, 7, 7]
