"""The backward protocol of fromfound.layers, sentence by sentence, and the layers against torch.nn."""
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import Parameter
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fromfound import layers
from fromfound.backward import add_grad, check_grads
from fromfound.forward import cross_entropy, mse_loss
from fromfound.layers import CrossEntropyLoss, Linear, Loss, Model, Module, MSELoss, ReLU, Sequential, Sigmoid, Tanh, no_grad

ACTIVATIONS = [(ReLU, nn.ReLU), (Sigmoid, nn.Sigmoid), (Tanh, nn.Tanh)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small_net():
    return Sequential(Linear(4, 5), ReLU(), Sequential(Linear(5, 5), Tanh()), Linear(5, 3))


def torch_twin(net):
    "The equal torch.nn network with copied weights."
    if isinstance(net, Sequential): return nn.Sequential(*map(torch_twin, net))
    if isinstance(net, Linear):
        twin = nn.Linear(net.in_features, net.out_features, net.bias is not None, dtype=net.weight.dtype)
        twin.load_state_dict(net.state_dict())
        return twin
    return getattr(nn, type(net).__name__)()


def calls_kept(module):
    return sum(len(m.__dict__.get("_calls") or ()) for m in module.modules())


def backward(layer, out, g=None, **kwargs):
    out.g = torch.randn(out.shape).to(out) if g is None else g
    layer.backward(**kwargs)
    return out.g


class Identity(Module):
    def forward(self, x): return x
    def bwd(self, out, x): add_grad(x, out.g.clone())


class Count(TorchDispatchMode):
    "Counts matrix products."
    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += any(name in str(func) for name in ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.mv."))
        return func(*args, **(kwargs or {}))


# ---- gradients are added; out.g is neither changed nor shared ----

@pytest.mark.parametrize("make, shape", [
    (lambda: Linear(4, 3), (5, 4)), (lambda: Linear(4, 3, bias=False), (2, 3, 4)), (lambda: Linear(20, 3), (5, 20)),
    (lambda: Linear(1, 1), (1, 1)), (lambda: Linear(4, 3), (4,)), (ReLU, (3, 4)), (Sigmoid, (3, 4)), (Tanh, (3, 4)),
    (ReLU, ()), (Sequential, (3, 4)), (small_net, (6, 4)), (Identity, (3,)),
])
def test_check_grads(make, shape):
    check_grads(make(), torch.randn(shape))


@pytest.mark.parametrize("shape, target", [
    ((4, 3), torch.tensor([0, 2, 1, 1])), ((4, 3), torch.tensor([0, -100, -100, 1])), ((3,), torch.tensor(2)),
    ((2, 3, 4), torch.randint(0, 3, (2, 4))), ((1, 1), torch.tensor([0])), ((4, 3), torch.tensor([0, 2, 1, 1], dtype=torch.uint8)),
])
def test_check_grads_cross_entropy(shape, target):
    check_grads(CrossEntropyLoss(), torch.randn(shape), target)
    check_grads(Model(Sequential(Tanh()), CrossEntropyLoss()), torch.randn(shape), target)


def test_check_grads_mse():
    check_grads(MSELoss(), torch.randn(4, 3), torch.randn(4, 3))
    check_grads(MSELoss(), torch.tensor(1.0), torch.tensor(3.0))


def test_a_tensor_used_twice_gets_the_sum():
    x, layer = torch.tensor([-1.0, 2.0]), ReLU()
    x.g = torch.ones(2)  # the part of x + relu(x) that goes around
    backward(layer, layer(x), torch.ones(2))
    assert x.g.tolist() == [1, 2]


def test_gradients_are_added_out_of_place():
    x, layer = torch.randn(3, 4), Linear(4, 2)
    held = [torch.randn(3, 4), torch.randn(2, 4), torch.randn(2)]
    x.g, layer.weight.g, layer.bias.g = held
    before = [t.clone() for t in held]
    backward(layer, layer(x))
    assert all(map(torch.equal, held, before))  # whoever holds an old .g sees no change
    assert not any(map(torch.equal, held, [x.g, layer.weight.g, layer.bias.g]))


def test_zero_grad_sets_none():
    net = small_net()
    net(torch.randn(2, 4)).g = torch.ones(2, 3)
    assert all(getattr(p, "g", None) is None for p in net.parameters())
    net.layers[-1]._calls[-1].out.g = torch.ones(2, 3)
    net.backward()
    assert all(p.g is not None for p in net.parameters())
    net.zero_grad()
    assert all(p.g is None for p in net.parameters())


@pytest.mark.parametrize("make", [lambda: Linear(1, 1), ReLU, Sigmoid, Tanh, Identity, Sequential, lambda: Sequential(Identity(), Sequential())])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1)])
def test_out_g_is_never_changed_nor_shared(make, shape):
    layer, x = make(), torch.randn(shape)
    out = layer(x)
    g = out.g = torch.randn(shape)
    before = g.clone()
    layer.backward(input_grad=True)
    assert out.g is g and torch.equal(g, before)
    gs = [x.g, *(p.g for p in layer.parameters())]
    for t in gs: t.add_(1)
    assert torch.equal(g, before)
    assert len({t.untyped_storage().data_ptr() for t in [g, *gs]}) == 1 + len(gs)


@pytest.mark.parametrize("loss_func, target", [(MSELoss(), torch.zeros(1, 1)), (CrossEntropyLoss(), torch.zeros(1, dtype=torch.int64))])
def test_batch_of_one_shares_nothing(loss_func, target):
    x = torch.randn(1, 1)
    loss = loss_func(x, target)
    loss_func.backward()
    assert loss.g.untyped_storage().data_ptr() != x.g.untyped_storage().data_ptr()


# ---- tied weights, the same layer twice, last in first out ----

def test_the_same_layer_twice_in_a_net():
    layer = Linear(4, 4)
    net, x = Sequential(layer, ReLU(), layer), torch.randn(3, 4)
    check_grads(net, x)
    weight = layer.weight.clone().requires_grad_()
    bias = layer.bias.clone().requires_grad_()
    g = torch.randn(3, 4)
    F.linear(F.relu(F.linear(x, weight, bias)), weight, bias).backward(g)
    backward(net, net(x), g)
    assert_close(layer.weight.g, weight.grad)
    assert_close(layer.bias.g, bias.grad)
    assert len(list(net.parameters())) == 2


def test_tied_parameters():
    first, second = Linear(4, 4), Linear(4, 4)
    second.weight = first.weight
    check_grads(Sequential(first, Tanh(), second), torch.randn(3, 4))
    assert len(list(Sequential(first, second).parameters())) == 3


def test_calls_are_given_back_last_in_first_out():
    layer, xs = Sigmoid(), [torch.randn(n) for n in (2, 3, 4)]
    outs = [layer(x) for x in xs]
    for x, out in zip(xs[::-1], outs[::-1]):
        g = backward(layer, out)
        assert_close(x.g, g * out * (1 - out))
    with pytest.raises(RuntimeError, match="without a forward"): layer.backward()


@pytest.mark.parametrize("layer", [Linear(2, 2), ReLU(), MSELoss(), Sequential(), Sequential(ReLU()), Model(ReLU(), MSELoss())])
def test_backward_before_forward_and_once_too_often(layer):
    args = (torch.randn(2, 2),) * (1 + isinstance(layer, (MSELoss, Model)))
    with pytest.raises(RuntimeError, match="without a forward"): layer.backward()
    out = layer(*args)
    backward(layer, out)
    with pytest.raises(RuntimeError, match="without a forward"): layer.backward()


def test_a_single_layer_called_aside_cannot_confuse_its_net():
    net, x = Sequential(Linear(2, 2), ReLU()), torch.randn(3, 2)
    net[0](x), net[1](x)
    with pytest.raises(RuntimeError, match="Sequential.*without a forward"): net.backward()
    assert calls_kept(net) == 2


# ---- the gradient of the input ----

def test_sequential_computes_the_input_gradient_only_if_asked():
    net, x = Sequential(Linear(4, 5), ReLU(), Linear(5, 3)), torch.randn(6, 4)
    for asked, products in [(None, 3), (False, 3), (True, 4)]:
        out = net(x)
        out.g = torch.ones_like(out)
        with Count() as count: net.backward() if asked is None else net.backward(input_grad=asked)
        assert count.products == products
        assert hasattr(x, "g") == bool(asked)


def test_a_sequential_inside_another_passes_its_gradient_on():
    net, x = Sequential(Linear(4, 4), Sequential(Sequential(Linear(4, 4)), ReLU()), Linear(4, 2)), torch.randn(6, 4)
    twin = torch_twin(net)
    g = torch.randn(6, 2)
    twin(x).backward(g)
    backward(net, net(x), g)
    for p, q in zip(net.parameters(), twin.parameters()): assert_close(p.g, q.grad)
    assert not hasattr(x, "g")
    first = Sequential(Sequential(Linear(4, 4)), ReLU())
    backward(first, first(x))
    assert not hasattr(x, "g")


def test_model_asks_for_the_input_gradient_only_if_told():
    model, x, y = Model(small_net(), CrossEntropyLoss()), torch.randn(6, 4), torch.randint(0, 3, (6,))
    model(x, y)
    model.backward()
    assert not hasattr(x, "g")
    model(x, y)
    model.backward(input_grad=True)
    xt = x.clone().requires_grad_()
    F.cross_entropy(torch_twin(model.net)(xt), y).backward()
    assert_close(x.g, xt.grad)


def test_a_bwd_that_does_not_look_writes_on_a_stand_in():
    layer, x = Sequential(Identity()), torch.randn(3)
    backward(layer, layer(x))
    assert not hasattr(x, "g")
    backward(layer, layer(x), input_grad=True)
    assert x.g is not None


# ---- no_grad ----

def test_no_grad_keeps_nothing():
    net = small_net()
    with no_grad():
        net(torch.randn(2, 4))
        with no_grad(): net(torch.randn(2, 4))
        net(torch.randn(2, 4))
    assert calls_kept(net) == 0
    with pytest.raises(ZeroDivisionError):
        with no_grad(): 1 / 0
    net(torch.randn(2, 4))
    assert calls_kept(net) == 7  # five layers, the inner Sequential and the outer one


def test_no_grad_as_a_decorator():
    layer = ReLU()

    @no_grad()
    def predict(x, times): return layer(x) if times == 0 else predict(x, times - 1)

    predict(torch.ones(2), 3), predict(torch.ones(2), 0)
    assert calls_kept(layer) == 0 and predict.__name__ == "predict"
    layer(torch.ones(2))
    assert calls_kept(layer) == 1


def test_no_grad_in_one_thread_does_not_reach_another():
    layer, inside, go_on = ReLU(), threading.Event(), threading.Event()

    def predict():
        with no_grad():
            layer(torch.ones(2))
            inside.set()
            go_on.wait(10)
            layer(torch.ones(2))

    thread = threading.Thread(target=predict)
    thread.start()
    inside.wait(10)
    out = layer(torch.ones(2))
    go_on.set()
    thread.join()
    assert calls_kept(layer) == 1
    backward(layer, out)


def test_predicting_between_steps_disturbs_nothing():
    model, x, y = Model(small_net(), CrossEntropyLoss()), torch.randn(6, 4), torch.randint(0, 3, (6,))
    model(x, y)
    model.backward()
    want = [p.g for p in model.parameters()]
    model.zero_grad()
    model(x, y)
    out = model.predict(torch.randn(3, 4))
    with no_grad(): model(x, y)
    assert out.shape == (3, 3)
    model.backward()
    for p, g in zip(model.parameters(), want): assert torch.equal(p.g, g)
    assert calls_kept(model) == 0


def test_torch_no_grad_and_inference_mode_keep_calls_all_the_same():
    for mode in (torch.no_grad, torch.inference_mode):
        net, x = small_net(), torch.randn(2, 4)
        with mode():
            out = net(x)
            backward(net, out)
        assert all(p.g is not None for p in net.parameters())


def test_eval_mode_keeps_calls():
    net = small_net().eval()
    backward(net, net(torch.randn(2, 4)))


# ---- refusals leave everything as it was ----

class Refuses(Module):
    def __init__(self, error=ValueError): self.error = error
    def forward(self, x): raise self.error("no")


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError, KeyError, KeyboardInterrupt, NotImplementedError])
def test_a_refused_forward_leaves_what_was_kept_before(error):
    shared = Linear(4, 4)
    good, x = Sequential(shared, ReLU()), torch.randn(3, 4)
    first = good(x)
    bad = Model(Sequential(good, {"a": 1} and Sequential(shared, Refuses(error))), MSELoss())
    before = calls_kept(bad)
    with pytest.raises(error): bad(x, x)
    assert calls_kept(bad) == before == 3
    backward(good, first)
    with pytest.raises(RuntimeError): good.backward()


def test_a_refused_loss_leaves_no_call_in_the_net():
    model, x = Model(small_net(), CrossEntropyLoss()), torch.randn(3, 4)
    with pytest.raises(ValueError): model(x, torch.tensor([0, 1, 3]))
    assert calls_kept(model) == 0
    with pytest.raises(RuntimeError): model.backward()


def test_a_module_that_catches_a_refusal_goes_on():
    class Tries(Module):
        def __init__(self): self.first, self.second = Sequential(ReLU(), Refuses()), Tanh()
        def forward(self, x):
            try: return self.first(x)
            except ValueError: return self.second(x)
        def bwd(self, out, x):
            self.saved = out
            self.second._calls[-1].out.g = out.g.clone()
            self.second.backward()

    layer, x = Tries(), torch.randn(3)
    out = layer(x)
    assert calls_kept(layer.first) == 0 and calls_kept(layer.second) == 1
    backward(layer, out)
    assert x.g is not None and calls_kept(layer) == 0


WRONG_G = [(None, RuntimeError), (torch.ones(3, 2), ValueError), (torch.ones(2, 3).double(), TypeError), ([1.0], TypeError),
           (torch.ones(()), ValueError), (torch.ones(2, 3, device="meta"), TypeError)]


@pytest.mark.parametrize("make", [lambda: Linear(4, 3), small_net, lambda: Sequential(Linear(4, 3), Sequential()), lambda: Sequential(small_net())])
@pytest.mark.parametrize("wrong, error", WRONG_G)
def test_a_wrong_out_g_raises_before_anything_is_written_and_can_be_corrected(make, wrong, error):
    layer, x = make(), torch.randn(2, 4)
    earlier = layer(x)
    out = layer(x)
    out.g, kept = wrong, calls_kept(layer)
    with pytest.raises(error, match="out.g"): layer.backward(input_grad=True)
    assert calls_kept(layer) == kept
    assert not any(hasattr(t, "g") for t in (x, *layer.parameters()))
    backward(layer, out, input_grad=True)
    backward(layer, earlier, input_grad=True)
    assert calls_kept(layer) == 0


@pytest.mark.parametrize("wrong, error", [(torch.ones(1), ValueError), (torch.ones(()).double(), TypeError), (1.0, TypeError)])
def test_a_wrong_loss_g_raises_before_anything_is_written(wrong, error):
    model, x, y = Model(small_net(), CrossEntropyLoss()), torch.randn(3, 4), torch.tensor([0, 1, 2])
    loss = model(x, y)
    loss.g = wrong
    with pytest.raises(error, match="out.g"): model.backward()
    assert not any(hasattr(p, "g") for p in model.parameters())
    loss.g = torch.tensor(2.0)
    model.backward()
    twice = [p.g for p in model.parameters()]
    model.zero_grad()
    model(x, y)
    model.backward()
    for p, g in zip(model.parameters(), twice): assert_close(2 * p.g, g)


def test_a_loss_without_out_g_takes_it_as_one():
    for loss_func, target in [(MSELoss(), torch.randn(3, 4)), (CrossEntropyLoss(), torch.tensor([0, 1, 3]))]:
        x = torch.randn(3, 4)
        loss = loss_func(x, target)
        loss_func.backward()
        default, x.g = x.g, None
        loss = loss_func(x, target)
        loss.g = torch.tensor(1.0)
        loss_func.backward()
        assert torch.equal(default, x.g)
        assert getattr(target, "g", None) is None


def test_an_error_in_bwd_leaves_the_call():
    class Once(Module):
        broken = True
        def forward(self, x): return 2 * x
        def bwd(self, out, x):
            if self.broken: raise OSError
            add_grad(x, 2 * out.g)

    layer, x = Once(), torch.randn(3)
    out = layer(x)
    out.g = torch.ones(3)
    with pytest.raises(OSError): layer.backward()
    layer.broken = False
    layer.backward()
    assert x.g.tolist() == [2, 2, 2]


# ---- letting go ----

def refs_after_step(module, *args, keep_out=False, input_grad=True):
    "Weak references to all that a step has touched but the parameters."
    out = module(*args)
    tensors = {id(t): t for m in module.modules() for call in m._calls for t in (call.out, *call.args, *call.saved) if t is not None}
    if not isinstance(module, (Loss, Model)): out.g = torch.ones_like(out)
    refs = [weakref.ref(t) for t in tensors.values() if not (keep_out and t is out)]
    module.backward(input_grad=input_grad)
    return refs, out if keep_out else None


@pytest.mark.parametrize("make, args", [
    (lambda: Linear(4, 3), lambda: (torch.randn(2, 4),)), (ReLU, lambda: (torch.randn(2, 4),)), (small_net, lambda: (torch.randn(2, 4),)),
    (Sequential, lambda: (torch.randn(2, 4),)), (CrossEntropyLoss, lambda: (torch.randn(2, 4), torch.tensor([0, 1]))),
    (lambda: Model(small_net(), CrossEntropyLoss()), lambda: (torch.randn(2, 4), torch.tensor([0, 1]))),
])
@pytest.mark.parametrize("keep_out", [False, True])
def test_after_backward_nothing_is_kept(make, args, keep_out):
    module = make()
    gc.disable()  # letting go must not need the garbage collector
    try:
        refs, out = refs_after_step(module, *args(), keep_out=keep_out)
        assert refs and all(ref() is None for ref in refs)
    finally:
        gc.enable()
    assert calls_kept(module) == 0


def test_a_kept_loss_keeps_nothing_big_alive():
    model, x, y = Model(small_net(), CrossEntropyLoss()), torch.randn(50, 4), torch.randint(0, 3, (50,))
    loss = model(x, y)
    model.backward()
    assert loss.untyped_storage().nbytes() == loss.g.untyped_storage().nbytes() == 4
    assert not [r for r in gc.get_referents(loss) if isinstance(r, torch.Tensor) and r.numel() > 1]


def test_a_refused_forward_keeps_no_tensor_alive():
    net = Sequential(ReLU(), Linear(9, 2))
    x = torch.randn(3, 4)
    ref = weakref.ref(x)
    try: net(x)
    except ValueError: pass
    del x
    gc.collect()
    assert ref() is None


def test_calling_forward_directly_keeps_nothing():
    loss_func, logits = CrossEntropyLoss(), torch.randn(3, 4)
    loss_func.forward(logits, torch.tensor([0, 1, 2]))
    assert not [v for v in loss_func.__dict__.values() if v]


def test_forget():
    net = small_net()
    for _ in range(3): net(torch.randn(2, 4))
    net.forget()
    assert calls_kept(net) == 0


# ---- what a layer returns, and what it must not change ----

def test_a_layer_never_returns_what_it_was_given():
    x = torch.randn(3)
    for layer in (Identity(), Sequential(), Sequential(Identity(), Sequential(Identity()))):
        for context in (no_grad, torch.enable_grad, torch.no_grad):
            with context(): out = layer(x)
            assert out is not x and torch.equal(out, x)


def test_inputs_are_never_changed():
    for layer in (Linear(4, 4), ReLU(), Sigmoid(), Tanh(), small_net(), Sequential(ReLU()), Sequential(ReLU(), Linear(4, 2))):
        x = torch.randn(3, 4)
        before = x.clone()
        out = layer(x)
        backward(layer, out, input_grad=True)
        assert torch.equal(x, before) and x._version == 0
    logits, labels = torch.randn(3, 4), torch.tensor([0, -100, 2])
    before = logits.clone()
    loss_func = CrossEntropyLoss()
    loss_func(logits, labels)
    loss_func.backward()
    assert torch.equal(logits, before) and labels.tolist() == [0, -100, 2]


def test_a_relu_outside_a_chain_leaves_the_output_of_a_linear_alone():
    linear, relu = Linear(4, 4), ReLU()
    h = linear(torch.randn(30, 4))
    before = h.clone()
    out = relu(h)
    assert torch.equal(h, before) and h.data_ptr() != out.data_ptr()


def test_memory_is_shared_between_exactly_linear_and_relu():
    class Reader(Linear):
        def bwd(self, out, x):
            self.seen = out.clone()
            super().bwd(out, x)

    class MyReLU(ReLU): pass

    x = torch.randn(30, 4)
    for first, second in [(Reader(4, 4), ReLU()), (Linear(4, 4), MyReLU()), (Sequential(Linear(4, 4)), ReLU())]:
        net = Sequential(first, second)
        net(x)
        kept = (first[0] if isinstance(first, Sequential) else first)._calls[-1].out
        assert (kept < 0).any()
        backward(net, second._calls[-1].out)
    net = Sequential(Linear(4, 4), ReLU(), Linear(4, 2))
    net(x)
    assert net[0]._calls[-1].out.data_ptr() == net[1]._calls[-1].out.data_ptr()
    check_grads(net, x[:3])


def test_tensors_that_require_grad():
    net, x = small_net(), torch.randn(3, 4, requires_grad=True)
    for p in net.parameters(): p.requires_grad_(True)
    out = net(x)
    assert not out.requires_grad and out.grad_fn is None
    g = torch.randn(3, 3)
    backward(net, out, g, input_grad=True)
    twin = torch_twin(net)
    twin(x).backward(g)
    assert_close(x.g, x.grad)
    for p, q in zip(net.parameters(), twin.parameters()):
        assert_close(p.g, q.grad)
        assert p.grad is None and not p.g.requires_grad
    loss_func, logits = CrossEntropyLoss(), torch.randn(3, 4, requires_grad=True)
    loss_func(logits, torch.tensor([0, 1, 2]))
    loss_func.backward()
    assert logits.g is not None and logits.grad is None
    assert torch.is_grad_enabled()


# ---- subclasses ----

def test_a_subclass_may_override_bwd_alone():
    class Doubled(Linear):
        def bwd(self, out, x):
            add_grad(x, 2 * out.g @ self.weight)
            add_grad(self.weight, out.g.T @ x)
            add_grad(self.bias, out.g.sum(0))

    class Half(MSELoss):
        def bwd(self, out, input, target): add_grad(input, (input - target) / input.numel() * out.g)

    layer, x = Doubled(4, 3), torch.randn(2, 4)
    g = backward(layer, layer(x))
    assert_close(x.g, 2 * g @ layer.weight)
    loss_func, target = Half(), torch.zeros(2, 4)
    x.g = None
    loss_func(x, target)
    loss_func.backward()
    assert_close(x.g, x / 8)
    assert target.__dict__.get("g") is None


@pytest.mark.parametrize("call_super", [False, True])
def test_a_subclass_with_and_without_super_init(call_super):
    class Affine(Module):
        def __init__(self, n):
            if call_super: super().__init__()
            self.scale = Parameter(torch.ones(n))
            self.layers = [Linear(n, n), (ReLU(), {"deep": Linear(n, n)})]
        def forward(self, x):
            h = self.layers[0](x)
            self.save_for_backward(h)
            return h * self.scale
        def bwd(self, out, x):
            h, = self.saved_tensors
            add_grad(self.scale, (out.g * h).sum(0))
            add_grad(h, out.g * self.scale)
            self.layers[0].backward(input_grad=self.needs_input_grad)

    layer = Affine(3)
    names = ["scale", "layers.0.weight", "layers.0.bias", "layers.1.1.deep.weight", "layers.1.1.deep.bias"]
    assert [name for name, _ in layer.named_parameters()] == names
    layer.layers.pop()
    check_grads(layer, torch.randn(4, 3))
    check_grads(Sequential(Linear(2, 3), layer, ReLU()), torch.randn(4, 2))
    x = torch.randn(4, 3)
    net = Sequential(layer)
    backward(net, net(x))
    assert not hasattr(x, "g") and calls_kept(net) == 0


def test_unwritten_methods_say_so():
    class Bare(Module): pass
    class Half(Module):
        def forward(self, x): return x + 1

    with pytest.raises(NotImplementedError, match="Bare.*forward"): Bare()(torch.ones(2))
    half = Half()
    with pytest.raises(NotImplementedError, match="Half.*bwd"): backward(half, half(torch.ones(2)))


def test_a_module_that_calls_itself():
    class Nested(Module):
        def __init__(self): self.layer = Linear(3, 3)
        def forward(self, x, depth):
            h = self.layer(x)
            self.save_for_backward(h)
            return self(h, depth - 1) if depth else torch.tanh(h)
        def bwd(self, out, x, depth):
            h, = self.saved_tensors
            if depth:
                self._calls[-1].out.g = out.g.clone()
                self.backward()
            else: add_grad(h, out.g * (1 - out * out))
            self.layer.backward()

    check_grads(Nested(), torch.randn(2, 3), 2)


def test_arguments_by_name():
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    loss_func, layer = CrossEntropyLoss(), Linear(4, 2)
    loss = loss_func(target=y, input=x)
    loss_func.backward()
    assert_close(loss, F.cross_entropy(x, y)) and x.g is not None
    assert torch.equal(layer(input=x), layer(x))
    with pytest.raises(TypeError): layer(x=x)

    class KeywordOnly(Module):
        def forward(self, x, *, scale=1): return x * scale

    with pytest.raises(TypeError, match="scale"): KeywordOnly()(x, scale=2)


# ---- against torch.nn ----

@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4), (2, 0, 4)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_linear_is_torchs(shape, bias, dtype):
    torch.manual_seed(3)
    ours = Linear(4, 3, bias=bias, dtype=dtype)
    torch.manual_seed(3)
    theirs = nn.Linear(4, 3, bias=bias, dtype=dtype)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True): assert torch.equal(p, q) and p.dtype == q.dtype
    x = torch.randn(shape).to(dtype).requires_grad_()
    out, want = ours(x), theirs(x)
    assert out.shape == want.shape and out.dtype == dtype
    assert_close(out, want.detach())
    g = torch.randn(want.shape).to(dtype)
    want.backward(g)
    backward(ours, out, g)
    for ours_t, theirs_t in [(x, x), *zip(ours.parameters(), theirs.parameters())]: assert_close(ours_t.g, theirs_t.grad)


@pytest.mark.parametrize("sizes", [(0, 3), (4, 0), (0, 0), (1, 1)])
def test_linear_of_odd_sizes(sizes):
    ours, theirs = Linear(*sizes), nn.Linear(*sizes)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, sizes[0])
    out = ours(x)
    assert_close(out, theirs(x).detach())
    backward(ours, out)
    assert ours.weight.g.shape == ours.weight.shape and x.g.shape == x.shape


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(0, 4), max_size=3), n_in=st.integers(1, 14), n_out=st.integers(1, 5), seed=st.integers(0, 99))
def test_linear_shapes(shape, n_in, n_out, seed):
    torch.manual_seed(seed)
    net = Sequential(Linear(n_in, n_out), ReLU(), Linear(n_out, 2)).to(torch.float64)
    twin, x = torch_twin(net), torch.randn(*shape, n_in, dtype=torch.float64, requires_grad=True)
    want, out = twin(x), net(x)
    assert_close(out, want.detach())
    g = torch.randn_like(want)
    want.backward(g)
    backward(net, out, g, input_grad=True)
    assert_close(x.g, x.grad, rtol=1e-10, atol=1e-10)
    for p, q in zip(net.parameters(), twin.parameters()): assert_close(p.g, q.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ours, theirs", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(), (0,), (4,), (3, 4), (2, 3, 4), (2, 0, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_activations_are_torchs(ours, theirs, shape, dtype):
    layer, x = ours(), (3 * torch.randn(shape)).to(dtype).requires_grad_()
    want, out = theirs()(x), layer(x)
    assert torch.equal(out, want.detach())
    g = torch.randn(shape).to(dtype)
    want.backward(g)
    backward(layer, out, g)
    tolerance = {} if dtype in (torch.float32, torch.float64) else dict(rtol=0.02, atol=0.01)
    assert_close(x.g, x.grad, **tolerance)


def test_relu_at_zero_nan_and_infinity():
    x = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")], requires_grad=True)
    g = torch.tensor([1.0, 2.0, 3.0, float("inf"), float("inf")])
    F.relu(x).backward(g)
    layer = ReLU()
    backward(layer, layer(x), g)
    assert_close(x.g, x.grad, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 3), (2, 5, 3, 2), (1, 1)])
@pytest.mark.parametrize("ignore", [False, True])
def test_cross_entropy_is_torchs(dtype, shape, ignore):
    target = torch.randint(0, shape[0 if len(shape) == 1 else 1], shape[:1] + shape[2:] if len(shape) > 1 else ())
    if ignore and target.numel() > 1: target.view(-1)[0] = -100
    x = (5 * torch.randn(shape)).to(dtype).requires_grad_()
    want, loss_func = F.cross_entropy(x, target), CrossEntropyLoss()
    want.backward()
    loss = loss_func(x, target)
    loss_func.backward()
    tolerance = dict(rtol=1e-10, atol=1e-10) if dtype == torch.float64 else {} if dtype == torch.float32 else dict(rtol=0.02, atol=0.01)
    assert loss.shape == () and loss.dtype == x.g.dtype == dtype
    assert_close(loss, want.detach(), **tolerance)
    assert_close(x.g, x.grad, **tolerance)


def test_cross_entropy_with_huge_and_masked_logits():
    x = torch.tensor([[1e4, -1e4, 0.0], [-float("inf"), 0.0, 1.0], [1e30, 0.0, -1e30]], dtype=torch.float32, requires_grad=True)
    y = torch.tensor([1, 1, 0])
    F.cross_entropy(x, y).backward()
    loss_func = CrossEntropyLoss()
    assert_close(loss_func(x, y), F.cross_entropy(x, y).detach())
    loss_func.backward()
    assert_close(x.g, x.grad)


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_mse_is_torchs(shape, dtype):
    x, target = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    half = torch.finfo(dtype).bits == 16
    exact = (x.float() if half else x.clone()).requires_grad_()  # older torch has no half-precision mse_loss on the CPU
    want, loss_func = F.mse_loss(exact, target.to(exact.dtype)), MSELoss()
    want.backward()
    loss = loss_func(x, target)
    loss_func.backward()
    tolerance = dict(rtol=0.02, atol=0.01) if half else {}
    assert_close(loss, want.detach().to(dtype), **tolerance)
    assert_close(x.g, exact.grad.to(dtype), **tolerance)


def test_meta_device():
    model = Model(Sequential(Linear(4, 5, device="meta"), ReLU(), Linear(5, 3, device="meta"), Tanh(), Sigmoid()), CrossEntropyLoss())
    loss = model(torch.empty(2, 4, device="meta"), torch.empty(2, dtype=torch.int64, device="meta"))
    model.backward()
    assert loss.is_meta and all(p.g.is_meta and p.g.shape == p.shape for p in model.parameters())
    mse, x = MSELoss(), torch.empty(2, device="meta")
    mse(x, x + 1)
    mse.backward()
    assert x.g.is_meta


@pytest.mark.parametrize("layer", [Linear(4, 3), ReLU(), Sigmoid(), Tanh(), CrossEntropyLoss(), MSELoss()])
@pytest.mark.parametrize("bad", [torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool), [[1.0] * 4], None])
def test_bad_input_is_refused(layer, bad):
    args = (bad,) if not isinstance(layer, Loss) else (bad, torch.zeros(2, dtype=torch.int64))
    with pytest.raises((TypeError, ValueError), match=type(layer).__name__): layer(*args)
    assert calls_kept(layer) == 0


def test_losses_refuse():
    ce, mse, logits = CrossEntropyLoss(), MSELoss(), torch.randn(3, 4)
    for target in (torch.tensor([0, 1, 4]), torch.tensor([0, 1, -1]), torch.tensor([0, 1]), torch.tensor([[0], [1], [2]]), torch.full((3,), -100)):
        with pytest.raises(ValueError, match="CrossEntropyLoss"): ce(logits, target)
    with pytest.raises(ValueError): ce(torch.randn(0, 4), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(TypeError): ce(logits, torch.zeros(3))
    with pytest.raises(NotImplementedError): ce(logits, torch.softmax(logits, 1))
    for target in (torch.randn(3), torch.randn(3, 1), torch.randn(1, 4), torch.randn(4, 3)):
        with pytest.raises(ValueError, match="MSELoss"): mse(logits, target)
    with pytest.raises(ValueError): mse(torch.randn(0), torch.randn(0))
    with pytest.raises(TypeError): mse(logits, logits.double())
    assert calls_kept(ce) == calls_kept(mse) == 0
    assert not hasattr(logits, "g")


def test_options_not_built_are_refused():
    for make in (lambda: CrossEntropyLoss(weight=torch.ones(3)), lambda: CrossEntropyLoss(label_smoothing=0.1), lambda: MSELoss(reduction="sum"),
                 lambda: ReLU(inplace=True)):
        with pytest.raises((TypeError, NotImplementedError)): make()


def test_losses_agree_with_the_functions():
    x, y = torch.randn(5, 3), torch.randint(0, 3, (5,))
    assert_close(CrossEntropyLoss()(x, y), cross_entropy(x, y))
    assert_close(MSELoss()(x, x.flip(0)), mse_loss(x, x.flip(0)))


# ---- errors name the layer and its place ----

def test_errors_name_the_layer_and_its_place():
    net = Sequential(Linear(4, 5), Sequential(ReLU(), Linear(6, 2)))
    with pytest.raises(ValueError, match=r"^layer 1 of 2: layer 1 of 2: Linear\(in_features=6, out_features=2, bias=True\).*\(3, 5\)"):
        net(torch.randn(3, 4))
    out = net[0](torch.randn(3, 4))
    with pytest.raises(RuntimeError, match=r"Linear\(in_features=4, out_features=5, bias=True\).*out.g"): net[0].backward()
    net = Sequential(Linear(4, 5), ReLU())
    net(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match=r"layer 1 of 2: ReLU\(\).*out.g"): net.backward()
    assert out.shape == (3, 5)


def test_errors_of_other_classes_pass_as_they_are():
    class Odd(ValueError):
        def __init__(self, a, b): super().__init__(a, b)

    class Raises(Module):
        def forward(self, x): raise Odd(1, 2)

    with pytest.raises(Odd) as e: Sequential(Raises())(torch.ones(2))
    assert e.value.args == (1, 2)


# ---- Sequential as a list, Module's bookkeeping ----

def test_sequential_is_a_list_of_layers():
    net = small_net()
    assert len(net) == 4 and net[-1] is list(net)[-1] and isinstance(net[:2], Sequential) and net[:2][0] is net[0]
    assert net.append(ReLU()) is net and len(net) == 5
    for bad in (torch.relu, nn.ReLU(), [ReLU()], None):
        with pytest.raises(TypeError, match="layer"): Sequential(ReLU(), bad)
        with pytest.raises(TypeError, match="layer 5"): net.append(bad)
    with pytest.raises(IndexError): net[9]


def test_reprs_are_torchs():
    net = small_net()
    assert repr(net) == repr(torch_twin(net))
    assert repr(Sequential()) == repr(nn.Sequential()) and repr(MSELoss()) == repr(nn.MSELoss())
    model = Model(net, CrossEntropyLoss())
    assert repr(model).startswith("Model(\n  (net): Sequential(\n    (0): Linear(in_features=4")

    class Scale(Module):
        def __init__(self): self.scale, self.inner = Parameter(torch.ones(2, 3)), ReLU()

    assert repr(Scale()) == "Scale(\n  scale=(2, 3)\n  (inner): ReLU()\n)"


def test_a_module_that_holds_itself_hangs_nothing():
    a, b = Sequential(), Sequential()
    a.append(b), b.append(a)
    a.append(Linear(2, 2))
    assert len(list(a.modules())) == 3 and len(list(a.parameters())) == 2
    assert "..." in repr(a)
    a.train(), a.zero_grad(), a.state_dict(), a.to(torch.float64)


def test_named_parameters_as_torch():
    net = small_net()
    net[3].weight = Parameter(torch.randn(3, 5))
    twin = torch_twin(net)
    for kwargs in ({}, dict(prefix="p"), dict(recurse=False), dict(remove_duplicate=False)):
        assert [n for n, _ in net.named_parameters(**kwargs)] == [n for n, _ in twin.named_parameters(**kwargs)]
    assert [n for n, _ in net.named_modules()] == [n for n, _ in twin.named_modules()]
    assert [n for n, _ in net.named_children()] == [n for n, _ in twin.named_children()]


def test_a_parameter_cannot_be_replaced_by_something_else():
    layer = Linear(2, 2)
    with pytest.raises(TypeError, match="Parameter"): layer.weight = torch.ones(2, 2)
    layer.bias = None
    layer.weight = Parameter(torch.ones(2, 2))
    assert [n for n, _ in layer.named_parameters()] == ["weight"]


def test_train_and_eval():
    net = small_net()
    assert net.training and net.eval() is net and not any(m.training for m in net.modules())
    assert net.train() is net and all(m.training for m in net.modules())
    with pytest.raises(ValueError): net.train("yes")


def test_to_keeps_identity_and_moves_gradients_and_buffers():
    layer = Linear(2, 2)
    layer.register_buffer("mean", torch.zeros(2)), layer.register_buffer("count", torch.zeros((), dtype=torch.int64))
    layer.register_buffer("none", None)
    layer(torch.ones(3, 2)).g = torch.ones(3, 2)
    backward(layer, layer._calls[-1].out)
    held = dict(layer.named_parameters())
    for args, kwargs in [((torch.float64,), {}), ((), dict(dtype=torch.float32)), (("cpu", torch.float64), {}), ((torch.ones(1).half(),), {}),
                         ((), dict(device="cpu", dtype=torch.float64))]:
        assert layer.to(*args, **kwargs) is layer
        for name, p in layer.named_parameters(): assert p is held[name] and p.g.dtype == p.dtype == layer.mean.dtype
    assert layer.mean.dtype == torch.float64 and layer.count.dtype == torch.int64
    for bad in (torch.int64, 3.5, [torch.float64]):
        with pytest.raises(TypeError): layer.to(bad)
    with pytest.raises(TypeError): layer.register_buffer("x", [1])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_and_pickles(clone):
    net = Sequential(Linear(4, 4), ReLU())
    net.append(net[0])  # tied
    x = torch.randn(3, 4)
    out = net(x)
    other = clone(net)
    assert repr(other) == repr(net) and torch.equal(other(x), out)
    assert other[0].weight is other[2].weight
    backward(net, out)
    assert all(p is not q and getattr(p, "g", None) is None for p, q in zip(other.parameters(), net.parameters()))
    other.forget()
    with pytest.raises(RuntimeError): other.backward()


def test_a_copy_between_the_two_ways_has_no_call():
    layer = Linear(2, 2)
    out = layer(torch.ones(1, 2))
    for clone in (copy.deepcopy, copy.copy):
        other = clone(layer)
        with pytest.raises(RuntimeError): other.backward()
        other(torch.ones(1, 2))
    backward(layer, out)
    assert calls_kept(layer) == 0


def test_the_mutants_are_rejected():
    class Overwrites(ReLU):
        def bwd(self, out, x): x.g = out.g * (out > 0)
    class Shares(Module):
        def forward(self, x): return x + 1
        def bwd(self, out, x): add_grad(x, out.g)
    class Writes(ReLU):
        def bwd(self, out, x): add_grad(x, out.g.mul_(out > 0))
    class Forgets(Linear):
        def bwd(self, out, x): add_grad(x, out.g @ self.weight), add_grad(self.weight, out.g.T @ x)
    class Scaled(Linear):
        def bwd(self, out, x): super().bwd(out, x); self.bias.g = self.bias.g * 1.001
    class NoIncoming(MSELoss):
        def bwd(self, out, input, target): add_grad(input, (input - target) * (2 / input.numel()))

    for mutant, args in [(Overwrites(), 1), (Shares(), 1), (Writes(), 1), (Forgets(3, 2), 1), (Scaled(3, 2), 1), (NoIncoming(), 2)]:
        with pytest.raises(AssertionError): check_grads(mutant, *(torch.randn(4, 3) for _ in range(args)))


def test_public_names():
    for name in "Module Linear ReLU Sigmoid Tanh Loss MSELoss CrossEntropyLoss Sequential Model no_grad".split():
        assert name in layers.__all__ and getattr(layers, name).__doc__
