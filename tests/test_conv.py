"""fromfound.conv against torch.nn: values, gradients, state dicts, ties, training; what must be rejected; bad input."""
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from fromfound.backward import add_grad, check_grads
from fromfound.conv import AvgPool2d, Conv2d, Flatten, MaxPool2d, windows
from fromfound.layers import CrossEntropyLoss, Linear, Model, ReLU, Sequential, no_grad
from fromfound.optim import SGD

few = settings(max_examples=80, deadline=None)
exact = dict(rtol=1e-9, atol=1e-9)


def randn(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agrees(ours, theirs, x):
    "Forward, input gradient and parameter gradients, under a random incoming gradient, in float64; the input is left as it was."
    ours.to(torch.float64), theirs.double()
    x, x_theirs, before = x.clone(), x.clone().requires_grad_(), x.clone()
    out, wanted = ours(x), theirs(x_theirs)
    assert_close(out, wanted.detach(), **exact)
    g = randn(*out.shape, seed=1)
    out.g = g.clone()
    ours.backward()
    wanted.backward(g)
    assert_close(x.g, x_theirs.grad, **exact)
    assert torch.equal(x, before) and torch.equal(out.g, g)
    for name, p in ours.named_parameters(): assert_close(p.g, theirs.get_parameter(name).grad, **exact)


def pair_of(kind, *args, **options):
    ours, theirs = kind(*args, **options), getattr(nn, kind.__name__)(*args, **options)
    if kind is Conv2d: theirs.load_state_dict(ours.state_dict())
    return ours, theirs


sizes = st.tuples(st.integers(1, 3), st.integers(1, 3))


@few
@given(groups=st.integers(1, 3), c=st.integers(1, 4), o=st.integers(1, 3), k=sizes, stride=sizes, padding=st.tuples(*[st.integers(0, 2)] * 2),
       dilation=sizes, bias=st.booleans(), image=st.tuples(*[st.integers(1, 8)] * 2), n=st.sampled_from([None, 1, 3]))
def test_conv(groups, c, o, k, stride, padding, dilation, bias, image, n):
    assume(all(h + 2 * p > d * (size - 1) for h, p, d, size in zip(image, padding, dilation, k)))
    ours, theirs = pair_of(Conv2d, groups * c, groups * o, k, stride, padding, dilation, groups, bias)
    agrees(ours, theirs, randn(*([] if n is None else [n]), groups * c, *image))


@pytest.mark.parametrize("channels, groups", [(8, 1), (16, 1), (8, 8), (16, 2)])
def test_conv_of_many_channels(channels, groups):
    agrees(*pair_of(Conv2d, channels, 8, 3, stride=2, padding=1, groups=groups), randn(2, channels, 7, 9))
    agrees(*pair_of(Conv2d, channels, 8, 3, groups=groups), randn(2, 7, 9, channels).permute(0, 3, 1, 2))  # not contiguous


@pytest.mark.parametrize("kind", [MaxPool2d, AvgPool2d])
@few
@given(k=sizes, stride=st.one_of(st.none(), sizes), image=st.tuples(*[st.integers(3, 8)] * 2), n=st.sampled_from([None, 2]),
       ties=st.booleans(), padded=st.booleans())
def test_pooling(kind, k, stride, image, n, ties, padded):
    x = randn(*([] if n is None else [n]), 2, *image)
    agrees(*pair_of(kind, k, stride, tuple(size // 2 for size in k) if padded else 0), x.round() if ties else x)


def test_flatten():
    agrees(Flatten(), nn.Flatten(), randn(3, 2, 4, 5))
    agrees(Flatten(), nn.Flatten(), randn(3, 7))


def test_windows_are_a_view_of_unfolds_patches():
    x = randn(2, 3, 7, 6)
    view = windows(x, (3, 2), stride=(2, 1), dilation=(1, 2))
    assert view.data_ptr() == x.data_ptr()
    patches = F.unfold(x, (3, 2), stride=(2, 1), dilation=(1, 2))
    assert_close(view.permute(0, 1, 4, 5, 2, 3).reshape(patches.shape), patches)


@pytest.mark.parametrize("layer, shape", [
    (Conv2d(2, 3, 3, stride=2, padding=1), (2, 2, 4, 5)), (Conv2d(8, 2, 2), (1, 8, 3, 3)), (Conv2d(4, 2, 2, groups=2, bias=False), (2, 4, 3, 3)),
    (Conv2d(1, 2, 2, dilation=2), (1, 4, 4)), (MaxPool2d(2), (2, 2, 4, 5)), (MaxPool2d(3, 2, 1), (1, 2, 5, 5)), (AvgPool2d(2, 1), (2, 1, 3, 3)),
    (AvgPool2d(3, 2, 1), (2, 4, 4)), (Flatten(), (2, 2, 2, 3))])
def test_check_grads(layer, shape):
    check_grads(layer, randn(*shape))
    # With ties, too. Not where windows overlap: a pixel that is the first of one tie and not of another has, as in torch, a gradient
    # that no single move of it shows.
    if getattr(layer, "stride", None) == layer.__dict__.get("kernel_size"): check_grads(layer, randn(*shape).round())


class NotTurned(Conv2d):  # the input gets the kernel the wrong way round
    def bwd(self, out, input):
        super().bwd(out, input)
        input.g = F.conv_transpose2d(out.g, self.weight.flip(2, 3))


class NoOverlap(Conv2d):  # where patches overlap, the last one counts
    def bwd(self, out, input):
        super().bwd(out, input)
        into = windows(x_g := torch.zeros_like(input), self.kernel_size)
        patches_g = torch.einsum("noyx,ocuv->ncyxuv", out.g, self.weight)
        for u, v in product(*map(range, self.kernel_size)): into[..., u, v] = patches_g[..., u, v]
        input.g = x_g


class BiasOfOnePosition(Conv2d):
    def bwd(self, out, input):
        super().bwd(out, input)
        self.bias.g = out.g[..., 0, 0].sum(0)


class FirstImageOnly(Conv2d):
    def bwd(self, out, input):
        super().bwd(out, input)
        self.weight.g = torch.einsum("noyx,ncyxuv->ocuv", out.g[:1], windows(input, self.kernel_size)[:1])


class WeightTransposed(Conv2d):
    def bwd(self, out, input):
        super().bwd(out, input)
        self.weight.g = self.weight.g.transpose(2, 3).contiguous()


class KeepsLastPatches(Conv2d):
    def forward(self, input):
        out = super().forward(input)
        self._last = out.saved
        return out

    def bwd(self, out, input):
        out.saved = self._last
        super().bwd(out, input)


class Overwrites(Conv2d):
    def bwd(self, out, input):
        self.weight.g = None
        super().bwd(out, input)


class AllOfATie(MaxPool2d):
    def bwd(self, out, input):
        x_g = torch.zeros_like(input)
        for pixels, pixels_g in zip(self._places(input), self._places(x_g)): pixels_g += out.g * (pixels == out)
        add_grad(input, x_g)


class LastOfATieTwice(MaxPool2d):
    def bwd(self, out, input):
        super().bwd(out, input)
        input.g *= 1 + (input == input.max())


class NotDivided(AvgPool2d):
    def bwd(self, out, input):
        x_g = torch.zeros_like(input)
        for pixels_g in self._places(x_g): pixels_g += out.g
        add_grad(input, x_g)


class HandsOn(Flatten):
    def bwd(self, out, input): add_grad(input, out.g.view(input.shape))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mutant", [NotTurned, NoOverlap, BiasOfOnePosition, FirstImageOnly, WeightTransposed, KeepsLastPatches, Overwrites,
                                    AllOfATie, LastOfATieTwice, NotDivided, HandsOn])
def test_mutants_are_rejected(mutant, seed):
    torch.manual_seed(seed)
    layer = mutant(2, 2, 2) if issubclass(mutant, Conv2d) else mutant() if mutant is HandsOn else mutant(2)
    with pytest.raises(AssertionError): check_grads(layer, randn(2, 2, 4, 4, seed=seed).round(), seed=seed)


def cnn(module):
    return module.Sequential(module.Conv2d(1, 4, 3, padding=1), module.ReLU(), module.MaxPool2d(2), module.Conv2d(4, 8, 3), module.ReLU(),
                             module.AvgPool2d(2), module.Flatten(), module.Linear(8, 10))


class Ours: Sequential, Conv2d, ReLU, MaxPool2d, AvgPool2d, Flatten, Linear = Sequential, Conv2d, ReLU, MaxPool2d, AvgPool2d, Flatten, Linear


def test_fifty_steps_beside_torch():
    "The same weights, the same batches, the same curve; state dicts go both ways."
    torch.manual_seed(0)
    ours, theirs = cnn(Ours).to(torch.float64), cnn(nn).double()
    theirs.load_state_dict(ours.state_dict())
    model = Model(ours, CrossEntropyLoss())
    mine, other = SGD(model.parameters(), 0.1, 0.9), torch.optim.SGD(theirs.parameters(), 0.1, 0.9)
    x, y = randn(320, 1, 8, 8), torch.randint(10, (320,))
    for step in range(50):
        rows = torch.randperm(320)[:32]
        mine.zero_grad()
        loss = model(x[rows], y[rows])
        model.backward()
        mine.step()
        other.zero_grad()
        wanted = F.cross_entropy(theirs(x[rows]), y[rows])
        wanted.backward()
        other.step()
        assert_close(loss, wanted.detach(), **exact)
    fresh = cnn(Ours).to(torch.float64)
    fresh.load_state_dict(theirs.state_dict())
    with no_grad(): assert_close(fresh(x), theirs(x).detach(), **exact)


def test_a_conv_starts_as_torchs():
    torch.manual_seed(3)
    ours = Conv2d(4, 6, (3, 2), groups=2)
    torch.manual_seed(3)
    theirs = nn.Conv2d(4, 6, (3, 2), groups=2)
    for name, p in theirs.named_parameters(): assert torch.equal(dict(ours.named_parameters())[name], p)


@pytest.mark.parametrize("make, x, words", [
    (lambda: Conv2d(1, 1, 5), torch.zeros(2, 1, 4, 9), "5 × 5 .* 4 × 9"),
    (lambda: Conv2d(1, 1, 3, dilation=4, padding=1), torch.zeros(2, 1, 6, 6), "3 × 3 with dilation 4, 4 .* 8 × 8"),
    (lambda: Conv2d(3, 1, 1), torch.zeros(2, 4, 5, 5), r"\(2, 4, 5, 5\).* 3 channels"),
    (lambda: Conv2d(3, 1, 1), torch.zeros(3, 5), r"\(3, 5\).*\(N, C, H, W\)"),
    (lambda: MaxPool2d(3), torch.zeros(1, 1, 2, 5), "3 × 3 .* 2 × 5"),
    (lambda: AvgPool2d(2), torch.zeros(5), r"\(5,\).*\(N, C, H, W\)"),
    (lambda: Conv2d(3, 4, 1, groups=2), None, "2 groups don't divide 3 and 4"),
    (lambda: MaxPool2d(2, padding=2), None, "half of the window")])
def test_what_is_refused(make, x, words):
    with pytest.raises(ValueError, match=words): make()(x)


def test_dtype_and_memory():
    layer = Conv2d(2, 3, 3).to(torch.float64)
    x = randn(2, 2, 5, 5)
    out = layer(x)
    assert out.dtype == torch.float64
    out.g = torch.ones_like(out)
    layer.backward()
    assert not layer._calls and layer.weight.g.is_contiguous() and layer.weight.g.dtype == torch.float64
