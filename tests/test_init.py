"""fromfound.init against torch.nn.init: the same numbers to the last bit, the same signatures, errors that change nothing."""
import copy
import inspect
import math
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from fromfound import init

XAVIER = ["xavier_uniform_", "xavier_normal_"]
KAIMING = ["kaiming_uniform_", "kaiming_normal_"]
ALL = XAVIER + KAIMING
NONLINEARITIES = ["linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
                  "sigmoid", "tanh", "relu", "leaky_relu", "selu"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

shapes = st.lists(st.integers(1, 7), min_size=2, max_size=5).map(tuple)
seeds = st.integers(0, 2**63 - 1)


def generator(seed, draws=0):
    "A generator that has given `draws` numbers already."
    g = torch.Generator().manual_seed(seed)
    if draws: torch.rand(draws, generator=g)
    return g


def same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
    assert torch.equal(a.detach(), b.detach())


def both(name, make, *args, seed=0, draws=0, **kwargs):
    "Fill make() by our function and by torch's from equal generators, compare, and give ours back."
    ours, theirs = make(), make()
    g, h = generator(seed, draws), generator(seed, draws)
    state = torch.get_rng_state()
    out = getattr(init, name)(ours, *args, generator=g, **kwargs)
    assert out is ours, "the given tensor is returned"
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone when one is given"
    getattr(nn.init, name)(theirs, *args, generator=h, **kwargs)
    same_bits(ours, theirs)
    assert torch.equal(g.get_state(), h.get_state()), "as many numbers are drawn"
    return ours


# ---- the same numbers ----

@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(XAVIER), shape=shapes, dtype=st.sampled_from(DTYPES), seed=seeds, draws=st.integers(0, 3),
       gain=st.one_of(st.floats(0, 100), st.integers(0, 5)))
def test_xavier_is_torch(name, shape, dtype, seed, draws, gain):
    both(name, lambda: torch.zeros(shape, dtype=dtype), gain, seed=seed, draws=draws)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(KAIMING), shape=shapes, dtype=st.sampled_from(DTYPES), seed=seeds, draws=st.integers(0, 3),
       a=st.one_of(st.floats(-10, 10), st.integers(-3, 3)), mode=st.sampled_from(["fan_in", "fan_out", "FAN_IN", "Fan_Out"]),
       nonlinearity=st.sampled_from(NONLINEARITIES))
def test_kaiming_is_torch(name, shape, dtype, seed, draws, a, mode, nonlinearity):
    both(name, lambda: torch.zeros(shape, dtype=dtype), a, mode, nonlinearity, seed=seed, draws=draws)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(3, 5), (64, 100), (8, 3, 5), (8, 3, 5, 5), (4, 3, 2, 3, 2), (1, 1), (300, 300)])
def test_defaults_and_the_global_generator(name, shape):
    torch.manual_seed(7)
    ours = getattr(init, name)(torch.empty(shape))
    after = torch.get_rng_state()
    torch.manual_seed(7)
    theirs = getattr(nn.init, name)(torch.empty(shape))
    same_bits(ours, theirs)
    assert torch.equal(after, torch.get_rng_state())


@settings(max_examples=60, deadline=None)
@given(nonlinearity=st.sampled_from(NONLINEARITIES),
       param=st.one_of(st.none(), st.integers(-100, 100), st.floats(-1e6, 1e6), st.just(math.inf)))
def test_gain_is_torch(nonlinearity, param):
    assert init.calculate_gain(nonlinearity, param) == nn.init.calculate_gain(nonlinearity, param)
    assert isinstance(init.calculate_gain(nonlinearity, param), float)


def test_param_is_only_read_where_it_is_used():
    assert init.calculate_gain("relu", "nonsense") == math.sqrt(2)
    both("kaiming_normal_", lambda: torch.zeros(3, 4), "nonsense", nonlinearity="tanh")
    both("kaiming_uniform_", lambda: torch.zeros(3, 4), None)


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 9), min_size=2, max_size=6).map(tuple))
def test_fans_are_torch(shape):
    t = torch.empty(shape, device="meta")
    ours = init.fan_in_and_fan_out(t)
    assert ours == nn.init._calculate_fan_in_and_fan_out(t)
    assert type(ours) is tuple and all(type(n) is int for n in ours)


def test_fans_of_real_layers():
    assert init.fan_in_and_fan_out(nn.Linear(784, 10).weight) == (784, 10)
    assert init.fan_in_and_fan_out(nn.Conv2d(3, 8, 5).weight) == (75, 200)
    assert init.fan_in_and_fan_out(nn.Conv2d(6, 8, 5, groups=2).weight) == (75, 200)
    assert init.fan_in_and_fan_out(torch.ones(2, 3, dtype=torch.int64)) == (3, 2), "the shape alone is read"


@pytest.mark.parametrize("name", ["calculate_gain", *ALL])
def test_signatures_are_torch(name):
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (init, nn.init))
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
    assert [p.kind for p in ours.values()] == [p.kind for p in theirs.values()]


@pytest.mark.parametrize("bias", [True, False])
def test_the_default_of_nn_linear(bias):
    torch.manual_seed(3)
    layer = nn.Linear(17, 9, bias=bias)
    torch.manual_seed(3)
    same_bits(init.kaiming_uniform_(torch.empty(9, 17), a=math.sqrt(5)), layer.weight)


# ---- every kind of tensor ----

def transposed(): return torch.zeros(20, 30).T
def strided(): return torch.zeros(40, 60)[::2, 1::3]
def inner(): return torch.zeros(9, 20, 30).permute(2, 0, 1)[:, :, 3:17]
def channels_last(): return torch.zeros(8, 3, 5, 5).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("make", [transposed, strided, inner, channels_last])
@pytest.mark.parametrize("name", ALL)
def test_views_are_filled_in_place(name, make):
    before = make()
    out = both(name, make)
    assert out.stride() == before.stride()
    base = torch.zeros(40, 60)
    getattr(init, name)(base[::2, 1::3])
    assert (base != 0).sum() == 400 and (base[1::2] == 0).all(), "nothing beside the view is touched"


@pytest.mark.parametrize("name", ALL)
def test_parameters_and_tensors_that_require_grad(name):
    p = both(name, lambda: nn.Parameter(torch.zeros(6, 8)))
    assert isinstance(p, nn.Parameter) and p.requires_grad and p.is_leaf and p.grad_fn is None
    (p ** 2).sum().backward()
    torch.testing.assert_close(p.grad, 2 * p.detach())
    leaf = torch.zeros(6, 8, requires_grad=True)
    getattr(init, name)(leaf.T, generator=generator(1))  # a view of a leaf
    assert leaf.is_leaf and leaf.grad_fn is None and (leaf != 0).all()
    t = getattr(init, name)(torch.zeros(6, 8))
    assert not t.requires_grad
    assert torch.is_grad_enabled()
    with torch.no_grad(): getattr(init, name)(p)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ALL)
def test_meta(name):
    t = torch.empty(4, 5, device="meta", dtype=torch.float64)
    state = torch.get_rng_state()
    assert getattr(init, name)(t) is t and t.is_meta and t.dtype == torch.float64
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 0, 2), (2, 3, 0), (0,)])
@pytest.mark.parametrize("name", ALL)
def test_no_elements(name, shape):
    t, g = torch.empty(shape), generator(0)
    state = g.get_state()
    if name in XAVIER and shape == (0,):
        with pytest.raises(ValueError, match="fewer than 2 dimensions"): getattr(init, name)(t, generator=g)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert getattr(init, name)(t, generator=g) is t
    assert torch.equal(state, g.get_state()) and t.shape == shape
    if name in KAIMING:  # as torch does; its Xavier functions do not warn
        assert [str(w.message) for w in caught] == ["Initializing zero-element tensors is a no-op"]
        assert caught[0].filename == __file__, "the warning points to the line that called"
    else:
        assert not caught


# ---- what the numbers are ----

@pytest.mark.parametrize("name, shape, std", [
    ("xavier_normal_", (200, 300), math.sqrt(2 / 500)), ("xavier_uniform_", (200, 300), math.sqrt(2 / 500)),
    ("kaiming_normal_", (200, 300), math.sqrt(2 / 300)), ("kaiming_uniform_", (200, 300), math.sqrt(2 / 300)),
    ("kaiming_normal_", (50, 20, 5, 5), math.sqrt(2 / 500)), ("kaiming_uniform_", (50, 20, 5, 5), math.sqrt(2 / 500)),
])
def test_mean_std_and_range(name, shape, std):
    w = getattr(init, name)(torch.empty(shape, dtype=torch.float64), generator=generator(0))
    assert abs(w.mean()) < 0.02 * std and abs(w.std() / std - 1) < 0.02
    largest = (w.abs().max() / std).item()
    if "uniform" in name: assert 1.72 < largest <= math.sqrt(3)
    else: assert largest > 3


@pytest.mark.parametrize("mode, fan", [("fan_in", 300), ("fan_out", 200)])
def test_mode_and_gain(mode, fan):
    w = init.kaiming_normal_(torch.empty(200, 300), 0.5, mode, generator=generator(0))
    assert abs(w.std().item() / math.sqrt(2 / 1.25 / fan) - 1) < 0.02
    w = init.xavier_normal_(torch.empty(200, 300), gain=3, generator=generator(0))
    assert abs(w.std().item() / (3 * math.sqrt(2 / 500)) - 1) < 0.02


def test_fifty_relu_layers_keep_their_size():
    ends = []
    for seed in range(5):
        g = generator(seed)
        x = torch.randn(64, 300, generator=generator(1000 + seed))
        for _ in range(50): x = (x @ init.kaiming_normal_(torch.empty(300, 300), generator=g).T).relu()
        ends.append(x.pow(2).mean().sqrt().item())
    assert all(0.1 < e < 10 for e in ends)


# ---- errors, after which nothing has changed ----

def refused(error, match, f, t, *args, **kwargs):
    "f(t, …) raises, and neither t nor a generator has changed."
    g = kwargs.setdefault("generator", generator(0))
    is_generator = isinstance(g, torch.Generator)
    state, globally = (g.get_state() if is_generator else None), torch.get_rng_state()
    before = copy.deepcopy(t)
    with pytest.raises(error, match=match): f(t, *args, **kwargs)
    assert not is_generator or torch.equal(state, g.get_state())
    assert torch.equal(globally, torch.get_rng_state())
    assert torch.equal(t, before) if isinstance(t, torch.Tensor) else repr(t) == repr(before)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [[[1.0, 2.0]], None, 3.0, "weight", nn.Linear(2, 3), ((1.0,),)])
def test_no_tensor(name, bad):
    refused(TypeError, f"{name}: tensor is .*not a tensor", getattr(init, name), bad)


def test_no_numpy_array():
    np = pytest.importorskip("numpy")
    for name in [*ALL, "fan_in_and_fan_out"]:
        with pytest.raises(TypeError, match="tensor is a ndarray"): getattr(init, name)(np.ones((2, 3)))


@pytest.mark.parametrize("bad", [[[1.0]], None, (2, 3), torch.Size([2, 3])])
def test_fans_of_no_tensor(bad):
    with pytest.raises(TypeError, match="fan_in_and_fan_out: tensor is .*not a tensor"): init.fan_in_and_fan_out(bad)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(3, 4), (0, 4)])
@pytest.mark.parametrize("name", ALL)
def test_no_floats(name, shape, dtype):
    refused(TypeError, name, getattr(init, name), torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (5,)])
@pytest.mark.parametrize("name", [*ALL, "fan_in_and_fan_out"])
def test_too_few_dimensions(name, shape):
    f = getattr(init, name)
    if name == "fan_in_and_fan_out": f = lambda t, generator: init.fan_in_and_fan_out(t)
    named = str(tuple(shape)).replace("(", r"\(").replace(")", r"\)")
    refused(ValueError, f"Fan in and fan out can not be computed .* fewer than 2 dimensions.*{named}", f, torch.ones(shape))


@pytest.mark.parametrize("mode", ["fan", "fan_avg", "", None, 1, "fan_in "])
@pytest.mark.parametrize("name", KAIMING)
def test_unknown_mode(name, mode):
    refused(ValueError, "not supported, please use one of", getattr(init, name), torch.ones(3, 4), mode=mode)
    refused(ValueError, "not supported, please use one of", getattr(init, name), torch.ones(0, 4), mode=mode)


@pytest.mark.parametrize("nonlinearity", ["gelu", "Relu", "", None, 3, ["relu"], torch.relu])
@pytest.mark.parametrize("name", KAIMING)
def test_unknown_nonlinearity(name, nonlinearity):
    with pytest.raises(ValueError, match="Unsupported nonlinearity"): init.calculate_gain(nonlinearity)
    refused(ValueError, "Unsupported nonlinearity", getattr(init, name), torch.ones(3, 4), nonlinearity=nonlinearity)


@pytest.mark.parametrize("param", [True, False, "0.1", [0.1], torch.tensor(0.1), math.nan, 1j])
@pytest.mark.parametrize("name", KAIMING)
def test_bad_slope(name, param):
    with pytest.raises(ValueError, match="negative_slope .* not a valid number"): init.calculate_gain("leaky_relu", param)
    refused(ValueError, "negative_slope .* not a valid number", getattr(init, name), torch.ones(3, 4), param)


@pytest.mark.parametrize("gain, error", [(-1, ValueError), (-1e-9, ValueError), (math.nan, ValueError), (math.inf, ValueError),
                                         ("relu", TypeError), (None, TypeError), ([1.0], TypeError)])
@pytest.mark.parametrize("name", XAVIER)
def test_bad_gain(name, gain, error):
    refused(error, None, getattr(init, name), torch.ones(3, 4), gain)


@pytest.mark.parametrize("name", ALL)
def test_bad_generator_and_shared_memory(name):
    refused(TypeError, None, getattr(init, name), torch.ones(3, 4), generator=0)
    row = torch.ones(1, 4)
    with pytest.raises(RuntimeError): getattr(init, name)(row.expand(3, 4))  # one number in three places: torch refuses
    assert torch.equal(row, torch.ones(1, 4))


@pytest.mark.parametrize("name", ALL)
def test_unknown_arguments_are_not_ignored(name):
    with pytest.raises(TypeError): getattr(init, name)(torch.ones(3, 4), distribution="normal")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ALL)
def test_gpu(name):
    g, h = (torch.Generator("cuda").manual_seed(0) for _ in range(2))
    ours = getattr(init, name)(torch.empty(30, 40, device="cuda"), generator=g)
    same_bits(ours, getattr(nn.init, name)(torch.empty(30, 40, device="cuda"), generator=h))
