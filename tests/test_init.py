"""fromfound.init against torch.nn.init: the same numbers to the last bit, the same signatures."""
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fromfound import init

ALL = ["xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_"]
NONLINEARITIES = ["linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
                  "sigmoid", "tanh", "relu", "leaky_relu", "selu"]
shapes = st.lists(st.integers(1, 7), min_size=2, max_size=5).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
seeds = st.integers(0, 2**63 - 1)


def both(name, shape, dtype, seed, *args, **kwargs):
    "Fill two tensors, by our function and by torch's, from equal generators, and compare."
    ours, theirs = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    g, h = (torch.Generator().manual_seed(seed) for _ in range(2))
    state = torch.get_rng_state()
    assert getattr(init, name)(ours, *args, generator=g, **kwargs) is ours
    assert torch.equal(state, torch.get_rng_state()), "torch's own generator is left alone when one is given"
    getattr(nn.init, name)(theirs, *args, generator=h, **kwargs)
    assert torch.equal(ours, theirs) and torch.equal(g.get_state(), h.get_state())


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(ALL[:2]), shape=shapes, dtype=dtypes, seed=seeds, gain=st.floats(0, 100))
def test_xavier_is_torch(name, shape, dtype, seed, gain): both(name, shape, dtype, seed, gain)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(ALL[2:]), shape=shapes, dtype=dtypes, seed=seeds, a=st.floats(-10, 10),
       mode=st.sampled_from(["fan_in", "fan_out"]), nonlinearity=st.sampled_from(NONLINEARITIES))
def test_kaiming_is_torch(name, shape, dtype, seed, a, mode, nonlinearity):
    both(name, shape, dtype, seed, a, mode, nonlinearity)


@pytest.mark.parametrize("name", ALL)
def test_defaults_and_torchs_own_generator(name):
    filled = []
    for module in (init, nn.init):
        torch.manual_seed(7)
        filled.append(getattr(module, name)(nn.Parameter(torch.empty(64, 100))))
    assert torch.equal(*filled) and filled[0].requires_grad


@settings(max_examples=60, deadline=None)
@given(nonlinearity=st.sampled_from(NONLINEARITIES), param=st.one_of(st.none(), st.floats(-1e6, 1e6)))
def test_gain_is_torch(nonlinearity, param):
    assert init.calculate_gain(nonlinearity, param) == nn.init.calculate_gain(nonlinearity, param)


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 9), min_size=2, max_size=6).map(tuple))
def test_fans_are_torch(shape):
    t = torch.empty(shape)
    assert init.fan_in_and_fan_out(t) == nn.init._calculate_fan_in_and_fan_out(t)


@pytest.mark.parametrize("name", ["calculate_gain", *ALL])
def test_signatures_are_torch(name):
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (init, nn.init))
    assert [(n, p.default) for n, p in ours.items()] == [(n, p.default) for n, p in theirs.items()]


def test_refusals_change_nothing():
    w = torch.ones(3, 4)
    with pytest.raises(ValueError, match="no gain is known for 'gelu'; there are leaky_relu, linear"):
        init.kaiming_normal_(w, nonlinearity="gelu")
    with pytest.raises(ValueError, match="mode must be 'fan_in' or 'fan_out', not 'in'"): init.kaiming_uniform_(w, mode="in")
    assert torch.equal(w, torch.ones(3, 4))
    for name in ALL:
        with pytest.raises(ValueError, match=r"\(3,\) is no weight"): getattr(init, name)(torch.ones(3))
