"""check_grads must reject every wrong backward below and accept every right one."""
import math

import pytest
import torch
from torch import Tensor

from fromfound import layers
from fromfound.backward import (FunctionPair, add_grad, check_grads, cross_entropy_grad, linear_grad, mse_loss_grad, relu_grad,
                                sigmoid_grad, tanh_grad)
from fromfound.forward import cross_entropy, linear, mse_loss, relu, sigmoid, softmax, tanh


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape) + sum(shape)), dtype=dtype)


def add(t, grad):
    "Adds without add_grad's checks: mutants are free to be wrong."
    t.g = grad if getattr(t, "g", None) is None else t.g + grad


class Layer:
    "The protocol in its smallest form: keeps its calls, last in, first out."
    def __init__(self, forward, bwd, **params):
        self.fwd, self.bwd, self.params, self.calls = forward, bwd, params, []

    def parameters(self): return list(self.params.values())

    def __call__(self, *inputs):
        out = self.fwd(*inputs, **self.params)
        self.calls.append((inputs, out))
        return out

    def backward(self):
        inputs, out = self.calls.pop()
        self.bwd(out, *inputs, **self.params)


class OneCall(Layer):
    "The same, but it keeps only its last call, as the first classes of many courses do."
    def __call__(self, *inputs):
        self.inputs, self.out = inputs, self.fwd(*inputs, **self.params)
        return self.out

    def backward(self): self.bwd(self.out, *self.inputs, **self.params)


X, W, B = rand(4, 3), rand(3, 3), rand(3)  # a square weight: a transpose changes no shape
LOGITS, LABELS = rand(4, 5), torch.tensor([0, 4, 2, 2])


def lin(x, weight, bias): return x @ weight.T + bias
def lin_bwd(out, x, weight, bias):
    add(x, out.g @ weight)
    add(weight, out.g.T @ x)
    add(bias, out.g.sum(0))


def soft_bwd(out, x): add(x, out * (out.g - (out.g * out).sum(-1, keepdim=True)))
def soft(x): return x.softmax(-1)


def layer_norm(x, weight, bias):
    d = x - x.mean(-1, keepdim=True)
    return d / (d.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def norm_bwd(dim):
    def bwd(out, x, weight, bias):
        d = x - x.mean(dim, keepdim=True)
        r = (d.square().mean(dim, keepdim=True) + 1e-5).rsqrt()
        h, g = d * r, out.g * weight
        add(x, r * (g - g.mean(dim, keepdim=True) - h * (g * h).mean(dim, keepdim=True)))
        add(weight, (out.g * h).flatten(0, -2).sum(0))
        add(bias, out.g.flatten(0, -2).sum(0))
    return bwd


def batch_norm(x, weight, bias):
    d = x - x.mean(0)
    return d / (d.square().mean(0) + 1e-5).sqrt() * weight + bias


def linear_layer(bwd): return Layer(lin, bwd, weight=W.clone(), bias=B.clone())


MUTANTS = {}


def mutant(f): MUTANTS[f.__name__] = f; return f
def of_linear(bwd): mutant(lambda: (linear_layer(bwd), X)); MUTANTS[bwd.__name__] = MUTANTS.pop("<lambda>"); return bwd
def of_x(forward, x=X):
    def register(bwd):
        MUTANTS[bwd.__name__] = lambda: (Layer(forward, bwd), x)
        return bwd
    return register


# --- overwriting, missing, zero

@of_linear
def overwrites_everything(out, x, weight, bias): x.g, weight.g, bias.g = out.g @ weight, out.g.T @ x, out.g.sum(0)
@of_linear
def overwrites_bias_only(out, x, weight, bias): add(x, out.g @ weight); add(weight, out.g.T @ x); bias.g = out.g.sum(0)
@of_linear
def overwrites_weight_only(out, x, weight, bias): add(x, out.g @ weight); weight.g = out.g.T @ x; add(bias, out.g.sum(0))
@of_linear
def adds_twice_if_there(out, x, weight, bias):
    for _ in range(2 if getattr(x, "g", None) is not None else 1): add(x, out.g @ weight)
    add(weight, out.g.T @ x); add(bias, out.g.sum(0))
@of_linear
def averages_with_what_is_there(out, x, weight, bias):
    lin_bwd(out, x, weight, bias)
    weight.g = weight.g * (1 - 1e-6)
@of_linear
def no_bias_gradient(out, x, weight, bias): add(x, out.g @ weight); add(weight, out.g.T @ x)
@of_linear
def no_weight_gradient(out, x, weight, bias): add(x, out.g @ weight); add(bias, out.g.sum(0))
@of_linear
def no_input_gradient(out, x, weight, bias): add(weight, out.g.T @ x); add(bias, out.g.sum(0))
@of_linear
def writes_nothing(out, x, weight, bias): pass
@of_linear
def zeros_for_weight(out, x, weight, bias): add(x, out.g @ weight); add(weight, torch.zeros_like(weight)); add(bias, out.g.sum(0))
@of_x(soft)
def softmax_zeros(out, x): add(x, torch.zeros_like(x))
@of_x(soft)
def softmax_without_the_sum(out, x): add(x, out.g * out * (1 - out))
@of_x(soft)
def softmax_passes_on(out, x): add(x, out.g.clone())


@mutant
def layer_norm_zeros():
    def bwd(out, x, weight, bias): norm_bwd(-1)(out, x, weight, bias); x.g = x.g * 0
    return Layer(layer_norm, bwd, weight=rand(3), bias=rand(3)), X
@mutant
def layer_norm_mean_as_constant():
    def bwd(out, x, weight, bias):
        norm_bwd(-1)(out, x, weight, bias)
        d = x - x.mean(-1, keepdim=True)
        x.g = out.g * weight / (d.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return Layer(layer_norm, bwd, weight=rand(3), bias=rand(3)), X
@mutant
def batch_norm_zeros():
    def bwd(out, x, weight, bias): norm_bwd(0)(out, x, weight, bias); x.g = x.g * 0
    return Layer(batch_norm, bwd, weight=rand(3), bias=rand(3)), X
@mutant
def batch_norm_with_affine_one_and_zero():  # right only for weight 1: the checker's caller must not be the one to notice
    def bwd(out, x, weight, bias):
        norm_bwd(0)(out, x, torch.ones_like(weight), bias)
    return Layer(batch_norm, bwd, weight=rand(3), bias=rand(3)), X


# --- bias, shapes, scales

@of_linear
def bias_not_summed(out, x, weight, bias): add(x, out.g @ weight); add(weight, out.g.T @ x); add(bias, out.g)
@of_linear
def bias_kept_as_a_row(out, x, weight, bias): add(x, out.g @ weight); add(weight, out.g.T @ x); add(bias, out.g.sum(0, keepdim=True))
@of_linear
def bias_mean(out, x, weight, bias): add(x, out.g @ weight); add(weight, out.g.T @ x); add(bias, out.g.mean(0))
@of_linear
def bias_first_row(out, x, weight, bias): add(x, out.g @ weight); add(weight, out.g.T @ x); add(bias, out.g[0].clone())
@of_linear
def bias_summed_over_the_wrong_dimension(out, x, weight, bias):
    add(x, out.g @ weight); add(weight, out.g.T @ x); add(bias, out.g[:3].sum(1))
@of_linear
def weight_gradient_of_one_row(out, x, weight, bias): add(x, out.g @ weight); add(weight, out.g[:1].T @ x[:1]); add(bias, out.g.sum(0))
@of_linear
def weight_not_transposed(out, x, weight, bias): add(x, out.g @ weight.T); add(weight, out.g.T @ x); add(bias, out.g.sum(0))
@of_linear
def weight_gradient_transposed(out, x, weight, bias): add(x, out.g @ weight); add(weight, x.T @ out.g); add(bias, out.g.sum(0))
@of_linear
def divided_by_the_batch(out, x, weight, bias): add(x, out.g @ weight); add(weight, out.g.T @ x / len(x)); add(bias, out.g.sum(0))
@of_linear
def a_number_for_a_matrix(out, x, weight, bias): add(x, (out.g @ weight).sum()); add(weight, out.g.T @ x); add(bias, out.g.sum(0))
@of_linear
def a_python_number(out, x, weight, bias): x.g = 1.0; add(weight, out.g.T @ x); add(bias, out.g.sum(0))


@mutant
def broadcasting_gradient():  # (1, 3) would broadcast into (4, 3) if one only subtracted the two
    row = rand(3)
    return Layer(lambda x: (x * row).sum(), lambda out, x: add(x, out.g * row[None])), X
@mutant
def mse_divided_by_the_batch():
    return FunctionPair(mse_loss, lambda x, t: add_grad(x, 2 * (x - t) / len(x)), loss=True), X, rand(4, 3, seed=1)
@mutant
def mse_without_the_two():
    return FunctionPair(mse_loss, lambda x, t: add_grad(x, (x - t) / x.numel()), loss=True), X, rand(4, 3, seed=1)
@mutant
def mse_wrong_sign():
    return FunctionPair(mse_loss, lambda x, t: add_grad(x, 2 * (t - x) / x.numel()), loss=True), X, rand(4, 3, seed=1)
@mutant
def mse_ignores_out_g():
    return Layer(lambda x, target: (x - target).square().mean(), lambda out, x, t: add(x, 2 * (x - t) / x.numel())), X, rand(4, 3, seed=1)
@mutant
def cross_entropy_without_the_mean():
    def grad(x, y): add_grad(x, x.softmax(1) - torch.eye(5, dtype=x.dtype)[y])
    return FunctionPair(cross_entropy, grad, loss=True), LOGITS, LABELS
@mutant
def cross_entropy_without_the_label():
    return FunctionPair(cross_entropy, lambda x, y: add_grad(x, x.softmax(1) / len(x)), loss=True), LOGITS, LABELS


# --- small errors

@of_linear
def off_in_one_element_of_weight(out, x, weight, bias):
    lin_bwd(out, x, weight, bias)
    g = weight.g.clone(); g[2, 1] *= 1.001; weight.g = g
@of_linear
def off_by_an_absolute_thousandth(out, x, weight, bias):
    lin_bwd(out, x, weight, bias)
    g = x.g.clone(); g[3, 2] += 1e-3; x.g = g
@of_linear
def off_everywhere_by_a_thousandth(out, x, weight, bias):
    add(x, out.g @ weight * 1.001); add(weight, out.g.T @ x); add(bias, out.g.sum(0))
@of_linear
def last_element_never_written(out, x, weight, bias):
    g = out.g.T @ x; g[-1, -1] = 0
    add(x, out.g @ weight); add(weight, g); add(bias, out.g.sum(0))
@of_linear
def first_element_of_bias_never_written(out, x, weight, bias):
    g = out.g.sum(0); g[0] = 0
    add(x, out.g @ weight); add(weight, out.g.T @ x); add(bias, g)
@of_linear
def float32_inside(out, x, weight, bias):
    add(x, (out.g.float() @ weight.float()).double()); add(weight, out.g.T @ x); add(bias, out.g.sum(0))
@of_linear
def float32_inside_for_weight(out, x, weight, bias):
    add(x, out.g @ weight); add(weight, (out.g.T.float() @ x.float()).double()); add(bias, out.g.sum(0))
@of_linear
def float32_gradient(out, x, weight, bias): add(x, (out.g @ weight).float()); add(weight, out.g.T @ x); add(bias, out.g.sum(0))
@mutant
def float32_forward(): return Layer(lambda x: x.float() * 2, lambda out, x: add(x, out.g.double() * 2)), X
@of_x(lambda x: x.exp())
def small_gradient_off(out, x):
    g = out.g * out; g[g.abs() == g.abs().min()] *= 1.001
    add(x, g)
@of_x(lambda x: x.tanh(), X * 3)
def tanh_derivative_of_the_input(out, x): add(x, out.g * (1 - x.tanh() ** 2 * 1.0001))


# --- NaN

@of_x(torch.relu, X.round())
def relu_nan_at_zero(out, x): add(x, out.g * out / x)
@of_linear
def nan_in_one_element(out, x, weight, bias):
    lin_bwd(out, x, weight, bias)
    g = weight.g.clone(); g[0, 0] = math.nan; weight.g = g
@of_linear
def nan_everywhere(out, x, weight, bias): add(x, out.g * math.nan); add(weight, out.g.T @ x); add(bias, out.g.sum(0))
@of_linear
def infinite(out, x, weight, bias): add(x, out.g @ weight); add(weight, out.g.T @ x + math.inf); add(bias, out.g.sum(0))


# --- the incoming gradient

@of_x(torch.tanh)
def ignores_out_g(out, x): add(x, 1 - out * out)
@of_x(torch.tanh)
def right_only_for_ones(out, x): add(x, (1 - out * out) * out.g * out.g)
@of_x(torch.tanh)
def uses_the_sign_of_out_g(out, x): add(x, (1 - out * out) * out.g.abs())
@of_x(torch.tanh)
def uses_the_sum_of_out_g(out, x): add(x, (1 - out * out) * out.g.sum())
@of_x(torch.tanh)
def uses_the_mean_of_out_g(out, x): add(x, (1 - out * out) * out.g.mean())
@of_x(torch.tanh)
def shares_out_g_after_all(out, x): add(x, out.g.mul_(1 - out * out))
@of_x(torch.tanh)
def changes_out_g(out, x): add(x, out.g * (1 - out * out)); out.g.zero_()
@of_x(torch.tanh)
def doubles_out_g(out, x): add(x, out.g * (1 - out * out)); out.g.mul_(2)
@of_x(lambda x: x + 0)
def is_out_g(out, x): add(x, out.g)
@of_x(lambda x: x + 0)
def is_a_view_of_out_g(out, x): add(x, out.g.view_as(out.g))
@of_x(lambda x: x.flatten(1).clone(), rand(4, 3, 2))
def is_out_g_reshaped(out, x): add(x, out.g.reshape(x.shape))
@of_x(torch.tanh)
def flattens_as_if_contiguous(out, x): add(x, (out.g.view(-1) * (1 - out * out).flatten()).view(x.shape))
@of_x(torch.tanh)
def strides_as_if_contiguous(out, x): add(x, torch.as_strided(out.g, x.shape, (x.shape[1], 1)) * (1 - out * out))
@of_x(torch.tanh, rand(5))
def strides_as_if_contiguous_in_one_dimension(out, x): add(x, torch.as_strided(out.g, x.shape, (1,)) * (1 - out * out))


# --- what must not be touched, and memory that must not be shared

@of_linear
def changes_its_input(out, x, weight, bias): lin_bwd(out, x, weight, bias); x.mul_(2)
@of_linear
def changes_its_weight(out, x, weight, bias): lin_bwd(out, x, weight, bias); weight.sub_(0.1 * weight.g)
@of_linear
def changes_its_output(out, x, weight, bias): lin_bwd(out, x, weight, bias); out.zero_()
@mutant
def forward_changes_its_input(): return Layer(lambda x: x.clamp_(min=0), lambda out, x: add(x, out.g * (out > 0))), X
@mutant
def forward_changes_and_copies(): return Layer(lambda x: x.clamp_(min=0) * 1, lambda out, x: add(x, out.g * (out > 0))), X
@mutant
def forward_changes_its_parameter():
    def forward(x, weight): return x * weight.mul_(1.1)
    def bwd(out, x, weight): add(x, out.g * weight); add(weight, (out.g * x).sum(0))
    return Layer(forward, bwd, weight=rand(3)), X
@mutant
def returns_its_input(): return Layer(lambda x: x, lambda out, x: add(x, out.g.clone())), X
@mutant
def one_gradient_for_two():
    def bwd(out, a, b): g = out.g.clone(); add(a, g); add(b, g)
    return Layer(lambda a, b: a + b, bwd), X, rand(4, 3, seed=2)
@mutant
def gradient_is_the_parameter():
    def bwd(out, x, weight): add(x, weight); add(weight, x.clone())
    return Layer(lambda x, weight: (x * weight).sum(), bwd, weight=rand(4, 3, seed=5)), X
@mutant
def gradient_is_the_input():
    class Half(Layer):  # half the squared length: its gradient is x itself, and so is its memory
        grad_out = 1.0
    return Half(lambda x: x.square().sum() / 2, lambda out, x: add(x, x)), X
@mutant
def gradient_is_a_view_of_the_input():
    class Half(Layer):
        grad_out = 1.0
    return Half(lambda x: x.square().sum() / 2, lambda out, x: add(x, x.view_as(x))), X
@mutant
def two_gradients_overlap():
    def bwd(out, a, b):
        buffer = torch.cat([out.g.flatten(), out.g.flatten()[-1:]])
        add(a, buffer[:-1].view_as(a)); add(b, buffer[1:].view_as(b))
    return Layer(lambda a, b: (a + b.flatten().roll(1).view_as(b)), bwd), rand(1, 2), rand(1, 2, seed=4)


# --- state

@mutant
def reads_the_last_forward():
    class Relu(Layer):
        def __call__(self, x): self.mask = x > 0; return super().__call__(x)
        def backward(self): (x,), out = self.calls.pop(); add(x, out.g * self.mask)
    return Relu(torch.relu, None), X
@mutant
def reads_the_last_input_for_the_weight():
    class Lin(Layer):
        def __call__(self, x): self.x = x; return super().__call__(x)
        def backward(self):
            (x,), out = self.calls.pop()
            add(x, out.g @ self.params["weight"]); add(self.params["weight"], out.g.T @ self.x)
    return Lin(lambda x, weight: x @ weight.T, None, weight=W.clone()), X
@mutant
def first_in_first_out():
    class Queue(Layer):
        def backward(self): inputs, out = self.calls.pop(0); self.bwd(out, *inputs)
    return Queue(torch.tanh, lambda out, x: add(x, out.g * (1 - out * out))), X
@mutant
def wrong_for_the_second_of_two_uses():
    class Once(Layer):
        used = 0
        def backward(self):
            (x,), out = self.calls.pop()
            self.used += 1
            add(x, out.g * (1 - out * out) * (1 if self.used == 1 else 2))
    return Once(torch.tanh, None), X
@mutant
def nothing_for_the_second_of_two_uses():
    class Once(Layer):
        used = False
        def backward(self):
            (x,), out = self.calls.pop()
            if not self.used: add(x, out.g * (1 - out * out))
            self.used = True
    return Once(torch.tanh, None), X
@mutant
def writes_to_detached_copies():
    class Detached(Layer):
        def __call__(self, x):
            out = torch.tanh(x)
            self.calls.append(((x.detach().clone(),), out))
            return out
    return Detached(None, lambda out, x: add(x, out.g * (1 - out * out))), X
@mutant
def keeps_a_detached_output():
    class Detached(Layer):
        def __call__(self, x):
            out = torch.tanh(x)
            self.calls.append(((x,), out.detach()))
            return out
    return Detached(None, lambda out, x: add(x, out.g * (1 - out * out))), X
@mutant
def caches_the_gradient():
    class Cached(Layer):
        def backward(self):
            (x,), out = self.calls.pop()
            if not hasattr(self, "g"): self.g = out.g * (1 - out * out)
            add(x, self.g.clone())
    return Cached(torch.tanh, None), X
@mutant
def raises(): return Layer(torch.tanh, lambda out, x: 1 / 0), X


# --- kinks and ties

@of_x(torch.relu, X.round())
def relu_of_minus(out, x): add(x, out.g * (x < 0))
@of_x(torch.relu, X.round())
def relu_twice_at_zero(out, x): add(x, out.g * ((x > 0) + 3.0 * (x == 0)))
@of_x(lambda x: x.amax(-1), torch.tensor([[1., 1., 0.], [2., 0., 2.]]))
def max_gives_to_every_tie(out, x): add(x, out.g[:, None] * (x == out[:, None]))
@of_x(lambda x: x.amax(-1), torch.tensor([[1., 1., 0.], [2., 0., 2.]]))
def max_gives_ties_nothing(out, x): add(x, torch.zeros_like(x))
@mutant
def maximum_gives_both():
    def bwd(out, a, b): add(a, out.g * (a >= b)); add(b, out.g * (b >= a))
    return Layer(torch.maximum, bwd), X.round(), X.round()


@mutant
def two_uses_overwritten():
    class Twice:  # y = x + relu(x) whose relu overwrites
        def parameters(self): return []
        def __call__(self, x): self.x, self.out = x, x + x.relu(); return self.out
        def backward(self): self.x.g = self.out.g * 1; self.x.g = self.out.g * (self.x > 0)
    return Twice(), X
@mutant
def wrong_only_for_three_dimensions():
    def bwd(out, x, weight, bias):
        add(x, out.g @ weight); add(weight, (out.g.transpose(-1, -2) @ x).mean(0) if x.dim() == 3 else out.g.T @ x)
        add(bias, out.g.flatten(0, -2).sum(0))
    return Layer(lin, bwd, weight=W.clone(), bias=B.clone()), rand(2, 4, 3)


# --- parameters that only a closure reaches

class Closures:
    "An adapter as one would write it: two closures, and a list of what they use."
    def __init__(self, forward, bwd, *params): self.fwd, self.bwd, self.params = forward, bwd, list(params)
    def __call__(self, *inputs): self.inputs, self.out = inputs, self.fwd(*inputs); return self.out
    def backward(self): self.bwd(self.out, *self.inputs)
    def parameters(self): return self.params


def closed(dtype, wrong):
    w, b = W.to(dtype, copy=True), B.to(dtype, copy=True)
    def bwd(out, x):
        add(x, out.g @ w); add(b, out.g.sum(0))
        if wrong != "missing": add(w, x.T @ out.g if wrong == "transposed" else out.g.T @ x)
    return Closures(lambda x: x @ w.T + b, bwd, w, b), X.to(dtype)


for wrong in "missing", "transposed":
    for dtype in torch.float32, torch.float64:
        MUTANTS[f"closure_{wrong}_{dtype}"] = lambda dtype=dtype, wrong=wrong: closed(dtype, wrong)


# --- subclasses of a layer that override bwd alone

def subclass(base, *args):
    def register(bwd):
        def make():
            f = type(bwd.__name__, (base,), {"bwd": bwd})(*args)
            return f, (rand(4, 3, dtype=torch.float32) if base is not layers.CrossEntropyLoss else LOGITS), *(
                [LABELS] if base is layers.CrossEntropyLoss else [rand(4, 3, seed=1, dtype=torch.float32)] if base is layers.MSELoss else [])
        MUTANTS[bwd.__name__] = make
        return bwd
    return register


@subclass(layers.Linear, 3, 3)
def layer_without_bias_gradient(self, out, x): add_grad(x, out.g @ self.weight); add_grad(self.weight, out.g.T @ x)
@subclass(layers.Linear, 3, 3)
def layer_bias_not_summed(self, out, x):
    add_grad(x, out.g @ self.weight); add_grad(self.weight, out.g.T @ x); add_grad(self.bias, out.g)
@subclass(layers.Linear, 3, 3)
def layer_overwrites(self, out, x): x.g, self.weight.g, self.bias.g = out.g @ self.weight, out.g.T @ x, out.g.sum(0)
@subclass(layers.Linear, 3, 3)
def layer_transposed(self, out, x):
    add_grad(x, out.g @ self.weight.T); add_grad(self.weight, out.g.T @ x); add_grad(self.bias, out.g.sum(0))
@subclass(layers.Linear, 3, 3)
def layer_in_float32(self, out, x):
    add_grad(x, (out.g.float() @ self.weight.float()).to(x.dtype)); add_grad(self.weight, out.g.T @ x); add_grad(self.bias, out.g.sum(0))
@subclass(layers.Tanh)
def layer_overwrites_its_input(self, out, x): x.g = out.g * (1 - out * out)
@subclass(layers.ReLU)
def layer_passes_on(self, out, x): add_grad(x, out.g)
@subclass(layers.Sigmoid)
def layer_sigmoid_of_out(self, out, x): add_grad(x, out.g * out.sigmoid() * (1 - out.sigmoid()))
@subclass(layers.MSELoss)
def layer_mse_by_batch(self, out, x, target): add_grad(x, out.g * 2 * (x - target) / len(x))
@subclass(layers.MSELoss)
def layer_mse_ignores_out_g(self, out, x, target): add_grad(x, 2 * (x - target) / x.numel())
@subclass(layers.CrossEntropyLoss)
def layer_cross_entropy_zeros(self, out, x, target): add_grad(x, torch.zeros_like(x))


@mutant
def layer_reads_the_last_forward():
    class Mask(layers.Module):
        def forward(self, x): self.mask = x > 0; return x * self.mask
        def bwd(self, out, x): add_grad(x, out.g * self.mask)
    return Mask(), X
@mutant
def layer_inside_a_net():
    class Bad(layers.Tanh):
        def bwd(self, out, x): add_grad(x, out.g * (1 - out))
    return layers.Sequential(layers.Linear(3, 4), Bad(), layers.Linear(4, 2)), X
@mutant
def layer_inside_a_model():
    class Bad(layers.Linear):
        def bwd(self, out, x): super().bwd(out, x); self.bias.g = self.bias.g * 1.001
    return layers.Model(layers.Sequential(Bad(3, 4), layers.ReLU(), layers.Linear(4, 2)), layers.MSELoss()), X, rand(4, 2)


@pytest.mark.parametrize("name", MUTANTS)
def test_rejects(name):
    for seed in range(8):
        f, *inputs = MUTANTS[name]()
        with pytest.raises(AssertionError) as caught: check_grads(f, *inputs, seed=seed)
        assert len(str(caught.value)) > 20


# What the message says, for those whose cause has a name.
MESSAGES = {
    "overwrites_everything": r"input 0\[0, 0\]: a gradient is added to what is in \.g",
    "no_bias_gradient": r"parameter 1\[0\]: no gradient was written, finite differences give -?\d+\.\d+, autograd says -?\d+\.\d+",
    "softmax_zeros": r"input 0\[0, 0\]: your gradient is 0, finite differences give -?0\.\d+, autograd says -?0\.\d+",
    "bias_not_summed": r"parameter 1\.g is \(4, 3\), torch\.float64, but parameter 1 is \(3,\)",
    "off_in_one_element_of_weight": r"parameter 0\[2, 1\]: your gradient is",
    "off_by_an_absolute_thousandth": r"input 0\[3, 2\]: your gradient is",
    "is_out_g": r"input 0\.g shares memory with out\.g",
    "is_a_view_of_out_g": r"input 0\.g shares memory with out\.g",
    "one_gradient_for_two": r"input 1\.g shares memory with input 0\.g",
    "gradient_is_the_input": r"input 0\.g shares memory with input 0",
    "changes_out_g": r"out\.g was changed in place",
    "changes_its_input": r"input 0 was changed in place",
    "changes_its_weight": r"parameter 0 was changed in place",
    "changes_its_output": r"out was changed in place",
    "forward_changes_and_copies": r"input 0 was changed in place",
    "returns_its_input": r"f returned the very tensor",
    "flattens_as_if_contiguous": r"backward\(\) raised RuntimeError: view size",
    "strides_as_if_contiguous": r"wrong when out\.g isn't contiguous in memory",
    "reads_the_last_forward": r"x\[0, 0\]: wrong for the first of two calls \(does each keep its own state\?\)",
    "caches_the_gradient": r"wrong for the first of two calls",
    "max_gives_to_every_tie": r"each could be right alone, but not all",
    "maximum_gives_both": r"each could be right alone, but not all",
    "float32_gradient": r"input 0\.g is \(4, 3\), torch\.float32, but input 0 is \(4, 3\), torch\.float64",
    "float32_forward": r"f makes torch\.float32 of float64",
    "a_python_number": r"input 0\.g is 1\.0, but input 0 is \(4, 3\)",
    "raises": r"backward\(\) raised ZeroDivisionError",
    "nan_everywhere": r"your gradient is nan",
    "layer_without_bias_gradient": r"bias\[0\]: no gradient was written",
    "layer_inside_a_net": r"input\[|0\.weight\[",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_says_why(name):
    f, *inputs = MUTANTS[name]()
    with pytest.raises(AssertionError, match=MESSAGES[name]): check_grads(f, *inputs)


# --- right ones

RIGHT = {}
def right(f): RIGHT[f.__name__] = f; return f


def relu_bwd(out, x): add(x, out.g * (x > 0))
def tanh_bwd(out, x): add(x, out.g * (1 - out * out))


@right
def linear_plain(): return linear_layer(lin_bwd), X
@right
def linear_that_keeps_one_call(): return OneCall(lin, lin_bwd, weight=W.clone(), bias=B.clone()), X
@right
def relu_that_keeps_one_call(): return OneCall(torch.relu, relu_bwd), X
@right
def linear_in_float32():
    return Layer(lin, lin_bwd, weight=W.float(), bias=B.float()), X.float()
@right
def linear_that_requires_grad():
    return Layer(lin, lin_bwd, weight=torch.nn.Parameter(W.clone()), bias=torch.nn.Parameter(B.float())), X.clone().requires_grad_()
@right
def parameters_that_are_no_leaves():
    w = torch.nn.Parameter(W.clone())
    return Layer(lin, lin_bwd, weight=w * 2, bias=w.sum(0)), X * w.sum()
@right
def parameters_in_a_closure():
    w = rand(2, 3, dtype=torch.float32)
    class Closed:
        def parameters(self): yield w
        def __call__(self, x): self.x, self.out = x, x @ w.T; return self.out
        def backward(self): add(self.x, self.out.g @ w); add(w, self.out.g.T @ self.x)
    return Closed(), X
@right
def what_cannot_be_copied():
    f = linear_layer(lin_bwd)
    f.handle = (i for i in range(3))
    return f, X
@right
def relu_at_zero(): return Layer(torch.relu, relu_bwd), X.round()
@right
def relu_of_nothing_but_zeros(): return Layer(torch.relu, relu_bwd), torch.zeros(2, 3)
@right
def relu_with_the_other_convention(): return Layer(torch.relu, lambda out, x: add(x, out.g * (x >= 0))), X.round()
@right
def relu_beside_zero(): return Layer(torch.relu, relu_bwd), torch.tensor([1e-3, -1e-3, 1e-5, -1e-5, 1e-7, -1e-7, 1e-9, -1e-12])
@right
def leaky_relu_at_zero():
    return Layer(lambda x: torch.where(x > 0, x, 0.01 * x), lambda out, x: add(x, out.g * torch.where(x > 0, torch.ones_like(x), 0.01))), X.round()
@right
def x_plus_relu(): return Layer(lambda x: x + x.relu(), lambda out, x: add(x, out.g + out.g * (x > 0))), X.round()
@right
def absolute_value_at_zero(): return Layer(torch.abs, lambda out, x: add(x, out.g * x.sign())), X.round()
@right
def max_with_ties_first():
    def bwd(out, x): add(x, torch.zeros_like(x).scatter_(-1, x.argmax(-1, keepdim=True), out.g[:, None]))
    return Layer(lambda x: x.amax(-1), bwd), torch.tensor([[1., 1., 1.], [2., 0., 2.], [0., 0., 0.]])
@right
def max_with_ties_shared():
    def bwd(out, x): m = (x == out[:, None]).to(x.dtype); add(x, out.g[:, None] * m / m.sum(-1, keepdim=True))
    return Layer(lambda x: x.amax(-1), bwd), torch.tensor([[1., 1., 1.], [2., 0., 2.], [0., 0., 0.]])
@right
def maximum_with_ties():
    def bwd(out, a, b): add(a, out.g * (a >= b)); add(b, out.g * (b > a))
    return Layer(torch.maximum, bwd), X.round(), X.round().roll(1, 0)
@right
def max_pool_of_zeros():
    def forward(x): return x.unfold(-1, 2, 2).amax(-1)
    def bwd(out, x):
        w = x.unfold(-1, 2, 2)
        add(x, torch.zeros_like(w).scatter_(-1, w.argmax(-1, keepdim=True), out.g[..., None]).flatten(-2))
    return Layer(forward, bwd), torch.tensor([[0., 0., 1., 1., 0., 3.]])
@right
def softmax_plain(): return Layer(soft, soft_bwd), X
@right
def layer_norm_plain(): return Layer(layer_norm, norm_bwd(-1), weight=rand(3), bias=rand(3)), X
@right
def layer_norm_at_mean_1000(): return Layer(layer_norm, norm_bwd(-1), weight=rand(3), bias=rand(3)), X + 1000
@right
def batch_norm_plain(): return Layer(batch_norm, norm_bwd(0), weight=rand(3), bias=rand(3)), X
@right
def batch_norm_of_two_rows(): return Layer(batch_norm, norm_bwd(0), weight=rand(3), bias=rand(3)), X[:2]
@right
def batch_norm_that_counts():  # running statistics, which every call changes
    class Norm(Layer):
        running = torch.zeros(3)
        def __call__(self, x):
            self.running = self.running * 0.9 + x.mean(0) * 0.1
            return super().__call__(x)
    return Norm(batch_norm, norm_bwd(0), weight=rand(3), bias=rand(3)), X
@right
def batch_norm_whose_mean_autograd_must_not_see():
    def forward(x, weight, bias):
        with torch.no_grad(): mean, var = x.mean(0), x.var(0, correction=0)
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias
    return Layer(forward, norm_bwd(0), weight=rand(3), bias=rand(3)), X
@right
def dropout():
    class Dropout(Layer):
        def __call__(self, x):
            mask = (torch.rand(x.shape) > 0.5).to(x.dtype) * 2
            out = x * mask
            self.calls.append((x, mask, out))
            return out
        def backward(self): x, mask, out = self.calls.pop(); add(x, out.g * mask)
    return Dropout(None, None), X
@right
def dropout_with_a_generator_of_its_own():
    class Dropout(Layer):
        generator = None
        def __call__(self, x):
            if self.generator is None: self.generator = torch.Generator().manual_seed(1)
            mask = (torch.rand(x.shape, generator=self.generator) > 0.5).to(x.dtype) * 2
            out = x * mask
            self.calls.append((x, mask, out))
            return out
        def backward(self): x, mask, out = self.calls.pop(); add(x, out.g * mask)
    return Dropout(None, None), X
@right
def mse_with_a_float_target():
    return Layer(lambda x, target: (x - target).square().mean(), lambda out, x, t: add(x, out.g * 2 * (x - t) / x.numel())), X, rand(4, 3, seed=1)
@right
def mse_without_names():
    class Loss(Layer):
        def __call__(self, *inputs): return super().__call__(*inputs)
    return Loss(lambda *a: (a[0] - a[1]).square().mean(), lambda out, x, t: add(x, out.g * 2 * (x - t) / x.numel())), X, rand(4, 3, seed=1)
@right
def mse_with_both_gradients():
    def bwd(out, x, t): d = out.g * 2 * (x - t) / x.numel(); add(x, d); add(t, -d)
    return Layer(lambda x, target: (x - target).square().mean(), bwd), X, rand(4, 3, seed=1)
@right
def a_loss_without_out_g_takes_it_as_one():
    def bwd(out, x, target):
        g = 1 if getattr(out, "g", None) is None else out.g
        p = x.softmax(1); p[range(len(x)), target] -= 1
        add(x, g * p / len(x))
    return Layer(lambda x, target: torch.nn.functional.cross_entropy(x, target), bwd), LOGITS, LABELS
@right
def sine_and_product():
    def bwd(out, x1, x2): add(x1, out.g * (x1.cos() + x2)); add(x2, out.g * x1)
    return Layer(lambda x1, x2: x1.sin() + x1 * x2, bwd), torch.tensor(2.), torch.tensor(3.)
@right
def the_same_tensor_twice(): return Layer(lambda a, b: a * b, lambda out, a, b: (add(a, out.g * b), add(b, out.g * a))), X, X
@right
def tied_parameters():
    w = rand(3, 3, seed=9)
    def bwd(out, x, w1, w2):
        h = x @ w1.T
        add(x, out.g @ w2 @ w1); add(w1, (out.g @ w2).T @ x); add(w2, out.g.T @ h)
    return Layer(lambda x, w1, w2: x @ w1.T @ w2.T, bwd, w1=w, w2=w), X
@right
def a_parameter_that_is_an_input():
    f = Layer(lambda x, weight: (x * weight), lambda out, x, weight: (add(x, out.g * weight), add(weight, out.g * x)), weight=rand(4, 3, seed=3))
    return f, f.params["weight"]
@right
def a_parameter_without_a_part():
    def bwd(out, x, weight, unused): add(x, out.g @ weight); add(weight, out.g.T @ x)
    return Layer(lambda x, weight, unused: x @ weight.T, bwd, weight=W.clone(), unused=rand(2)), X
@right
def not_contiguous_input(): return Layer(torch.tanh, tanh_bwd), rand(6, 8)[::2, ::2].T
@right
def expanded_input(): return Layer(torch.tanh, tanh_bwd), rand(3).expand(4, 3)
@right
def expanded_gradient(): return Layer(lambda x: x.mean(), lambda out, x: add(x, (out.g / x.numel()).expand_as(x))), X
@right
def view_as_output(): return Layer(lambda x: x.flatten(1), lambda out, x: add(x, out.g.reshape(x.shape).clone())), rand(2, 3, 2)
@right
def adds_in_place():
    def bwd(out, x):
        if getattr(x, "g", None) is None: x.g = torch.zeros_like(x)
        x.g += out.g * (1 - out * out)
    return Layer(torch.tanh, bwd), X
@right
def parts_of_one_buffer():
    def bwd(out, a, b): g = out.g * 1; add(a, g[:, :2]); add(b, g[:, 2:])
    return Layer(lambda a, b: torch.cat([a, b], 1), bwd), rand(4, 2), rand(4, 3)
@right
def lets_go_of_out_g():
    def bwd(out, x): add(x, out.g * (1 - out * out)); out.g = None
    return Layer(torch.tanh, bwd), X
@right
def by_autograd():
    class Auto(Layer):
        def __call__(self, x):
            leaf = x.detach().requires_grad_()
            with torch.enable_grad(): out = torch.tanh(leaf) ** 2
            self.calls.append((x, leaf, out)); return out.detach()
        def backward(self):
            x, leaf, out = self.calls.pop()
            add(x, torch.autograd.grad(out, leaf, self.last.g)[0])
    class Auto2(Auto):
        def __call__(self, x): self.last = super().__call__(x); return self.last
    return Auto2(None, None), X
@right
def sums_of_many(): return Layer(lambda x: x.sum(0), lambda out, x: add(x, out.g.expand_as(x) * 1)), rand(200, 2)
@right
def steep(): return Layer(lambda x: (300 * x).sin(), lambda out, x: add(x, out.g * 300 * (300 * x).cos())), X
@right
def steep_roots(): return Layer(torch.sqrt, lambda out, x: add(x, out.g / (2 * out))), torch.tensor([1e-4, 1e-3, 0.1, 1, 1e4])
@right
def large_and_small(): return Layer(lambda x: x * x * x, lambda out, x: add(x, out.g * 3 * x * x)), torch.tensor([1e4, 1., 1e-4, 0.])
@right
def embedding():
    def bwd(out, index, weight): add(weight, torch.zeros_like(weight).index_add(0, index, out.g))
    return Layer(lambda index, weight: weight[index], bwd, weight=rand(4, 2)), torch.tensor([0, 2, 2])
@right
def a_gradient_of_zero():
    return Layer(lambda x: x * 0, lambda out, x: add(x, torch.zeros_like(x))), X
@right
def confident_cross_entropy():
    x = torch.eye(4, dtype=torch.float64)[[0, 1, 2]] * 40
    return FunctionPair(cross_entropy, cross_entropy_grad, loss=True), x, torch.tensor([0, 1, 2])
@right
def layer_with_own_state():
    class Mask(layers.Module):
        def forward(self, x): mask = x > 0; out = x * mask; out.saved = mask; return out
        def bwd(self, out, x): add_grad(x, out.g * out.saved)
    return Mask(), X


RIGHT["closure_float32"] = lambda: closed(torch.float32, None)
RIGHT["closure_float64"] = lambda: closed(torch.float64, None)
for shape in [(3,), (4, 3), (2, 4, 3), (2, 2, 2, 3), (0, 3), (4, 3)]:
    RIGHT[f"linear_of_{shape}"] = lambda shape=shape: (FunctionPair(linear, linear_grad), rand(*shape), rand(2, 3), rand(2))
    RIGHT[f"linear_without_bias_of_{shape}"] = lambda shape=shape: (FunctionPair(linear, linear_grad), rand(*shape), rand(2, 3))
    RIGHT[f"layer_linear_of_{shape}"] = lambda shape=shape: (layers.Linear(3, 2), rand(*shape, dtype=torch.float32))
for shape in [(), (3,), (4, 3), (2, 1, 3, 2), (0,), (2, 0)]:
    for forward, grad in (relu, relu_grad), (sigmoid, sigmoid_grad), (tanh, tanh_grad):
        RIGHT[f"{forward.__name__}_of_{shape}"] = lambda shape=shape, forward=forward, grad=grad: (FunctionPair(forward, grad), 3 * rand(*shape))
    for layer in layers.ReLU, layers.Sigmoid, layers.Tanh:
        RIGHT[f"layer_{layer.__name__}_of_{shape}"] = lambda shape=shape, layer=layer: (layer(), 3 * rand(*shape, dtype=torch.float32))
for shape in [(), (3,), (4, 3), (2, 1, 3)]:
    RIGHT[f"mse_of_{shape}"] = lambda shape=shape: (FunctionPair(mse_loss, mse_loss_grad, loss=True), rand(*shape), rand(*shape, seed=7))
    RIGHT[f"layer_mse_of_{shape}"] = lambda shape=shape: (layers.MSELoss(), rand(*shape), rand(*shape, seed=7))
RIGHT["cross_entropy"] = lambda: (FunctionPair(cross_entropy, cross_entropy_grad, loss=True), LOGITS, LABELS)
RIGHT["layer_cross_entropy"] = lambda: (layers.CrossEntropyLoss(), LOGITS, LABELS)


def net(): torch.manual_seed(0); return layers.Sequential(layers.Linear(3, 4), layers.ReLU(), layers.Linear(4, 2))


RIGHT["sequential"] = lambda: (net(), X.float())
RIGHT["sequential_at_zeros"] = lambda: (layers.Sequential(layers.ReLU(), layers.Linear(3, 2)), X.round())
RIGHT["sequential_in_another"] = lambda: (layers.Sequential(net(), layers.Tanh()), X)
RIGHT["sequential_twice_the_same"] = lambda: (lambda lin: (layers.Sequential(lin, layers.Tanh(), lin), X))(layers.Linear(3, 3))
RIGHT["model_mse"] = lambda: (layers.Model(net(), layers.MSELoss()), X, rand(4, 2))
RIGHT["model_cross_entropy"] = lambda: (layers.Model(net(), layers.CrossEntropyLoss()), X.float(), torch.tensor([0, 1, 1, 0]))


@pytest.mark.parametrize("name", RIGHT)
def test_accepts(name):
    f, *inputs = RIGHT[name]()
    assert check_grads(f, *inputs) is None


# --- the caller's things, and the arguments

@pytest.mark.parametrize("name", ["linear_in_float32", "parameters_in_a_closure", "what_cannot_be_copied", "linear_that_requires_grad",
                                  "closure_float32", "closure_float64", "closure_missing_torch.float64",
                                  "changes_its_weight", "changes_its_input", "forward_changes_its_parameter", "linear_of_(4, 3)"])
def test_leaves_the_callers_things_alone(name):
    f, *inputs = (RIGHT | MUTANTS)[name]()
    tensors = [*inputs, *(f.parameters() if hasattr(f, "parameters") else [])]
    for t in tensors: t.g = torch.full_like(t, 7.0)
    before = [(t.detach().clone(), t.dtype, t.requires_grad, t.g, t.data_ptr()) for t in tensors]
    state = torch.get_rng_state()
    try: check_grads(f, *inputs)
    except AssertionError: pass
    assert torch.equal(torch.get_rng_state(), state)
    for t, (values, dtype, requires_grad, g, place) in zip(tensors, before):
        assert t.dtype == dtype and t.requires_grad == requires_grad and t.data_ptr() == place and torch.equal(t, values)
        assert t.g is g and (g == 7).all() and t.grad is None


def test_keeps_the_calls_of_f():
    f = FunctionPair(tanh, tanh_grad)
    x = X.clone(); out = f(x)
    check_grads(f, rand(2, 2))
    assert len(f.calls) == 1
    out.g = torch.ones_like(out); f.backward()
    torch.testing.assert_close(x.g, 1 - out ** 2)


def test_names_come_from_the_signature():
    def grad(first, out, second): add_grad(first, out.g * second); add_grad(second, out.g * first * 2)
    with pytest.raises(AssertionError, match=r"second\[\d, \d\]: your gradient"):
        check_grads(FunctionPair(lambda first, second: first * second, grad), X, rand(4, 3, seed=1))
    with pytest.raises(AssertionError, match=r"^x: your gradient"):
        check_grads(FunctionPair(lambda x: x * x, lambda x, out: add_grad(x, out.g * x)), torch.tensor(2.0))


def test_an_exercise_that_is_not_done_says_so():
    def todo(x, out): raise NotImplementedError("your turn")
    with pytest.raises(NotImplementedError): check_grads(FunctionPair(tanh, todo), X)


def test_what_the_forward_refuses_is_the_callers_to_see():
    with pytest.raises(ValueError, match="did you mean weight.T"): check_grads(FunctionPair(linear, linear_grad), rand(4, 2), rand(2, 3))


def test_a_check_of_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing to check"):
        check_grads(Layer(lambda i: i.double(), lambda out, i: None), torch.tensor([1, 2]))


def test_inputs_from_the_same_seed_hide_nothing():  # out.g must not be the numbers that the caller drew
    for dtype in torch.float32, torch.float64:
        torch.manual_seed(0)
        x = torch.randn(4, 4, dtype=dtype)
        f = Layer(lambda x, weight: x @ weight.T, lambda out, x, weight: (add(x, out.g @ weight), add(weight, x.T @ out.g)), weight=rand(4, 4))
        with pytest.raises(AssertionError, match=r"parameter 0\[0, 1\]"): check_grads(f, x)


def test_every_element_counts():
    w = rand(5, 4)
    for place in range(w.numel()):
        def bwd(out, x, weight):
            add(x, out.g @ weight)
            g = out.g.T @ x
            g.view(-1)[place] *= 1.001
            add(weight, g)
        with pytest.raises(AssertionError, match=rf"parameter 0\[{place // 4}, {place % 4}\]"):
            check_grads(Layer(lambda x, weight: x @ weight.T, bwd, weight=w.clone()), rand(3, 4))


@pytest.mark.parametrize("seed", range(5))
def test_any_seed(seed):
    check_grads(linear_layer(lin_bwd), X, seed=seed)
    check_grads(Layer(torch.relu, relu_bwd), X.round(), seed=seed)
    for name in ["softmax_zeros", "float32_inside", "max_gives_to_every_tie", "ignores_out_g", "mse_ignores_out_g", "off_by_an_absolute_thousandth"]:
        f, *inputs = MUTANTS[name]()
        with pytest.raises(AssertionError): check_grads(f, *inputs, seed=seed)
