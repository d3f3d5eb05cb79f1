"""The training loop: batches, callbacks, interruption, resumption to the last bit, and what stops a run."""
import copy
import math
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fromfound import training
from fromfound.backward import add_grad
from fromfound.data import digits, spiral
from fromfound.forward import accuracy
from fromfound.layers import CrossEntropyLoss, Linear, Model, Module, MSELoss, ReLU, Sequential
from fromfound.optim import SGD, Adam, AdamW, CosineAnnealingLR, OneCycleLR, RMSprop, StepLR
from fromfound.training import (
    ActivationStats, Callback, Checkpoint, ClipGradNorm, DataLoader, EarlyStopping, History, Learner, Metrics, NaNGuard,
    NonFiniteError, ProgressBar, Schedule, confusion_matrix, evaluating, fit, load, plot_confusion, plot_decision_boundary,
    plot_stats, plot_worst, save, watch,
)


class RandomMask(Module):
    "Like dropout: in training, zeros numbers by torch's global generator; and keeps a running mean, like a norm layer."

    def __init__(self):
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input):
        if not self.training: return input * 1
        mask = (torch.rand_like(input) < 0.8).to(input.dtype) / 0.8
        self.seen.mul_(0.9).add_(input.mean(), alpha=0.1)
        self.save_for_backward(mask)
        return input * mask

    def bwd(self, out, input):
        if self.needs_input_grad: add_grad(input, out.g * self.saved_tensors[0])


torch.set_num_threads(1)
X, Y = spiral(30, generator=torch.Generator().manual_seed(1))  # 90 points: 6 batches of 16, the last of 10
OPTIMISERS = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), "Adam": lambda p: Adam(p, lr=1e-2, amsgrad=True),
    "AdamW": lambda p: AdamW(p, lr=1e-2), "RMSprop": lambda p: RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
}


def learner(callbacks=(), opt="Adam", schedule=True, seed=0, epochs=3, **loader):
    torch.manual_seed(seed)
    model = Model(Sequential(Linear(2, 16), ReLU(), RandomMask(), Linear(16, 3)), CrossEntropyLoss())
    opt = OPTIMISERS[opt](list(model.parameters()))
    loader = DataLoader(X, Y, 16, **{"shuffle": True, **loader})
    extra = [Schedule(OneCycleLR(opt, 2e-2, epochs=epochs, steps_per_epoch=len(loader)))] if schedule else []
    return Learner(model, opt, loader, valid=(X, Y), callbacks=[*extra, *callbacks])


def assert_same(a: Learner, b: Learner):
    "Everything that training goes on from is equal to the last bit."
    def flat(value):
        if isinstance(value, dict): return [z for k, v in value.items() for z in (k, *flat(v))]
        if isinstance(value, (list, tuple)): return [z for v in value for z in flat(v)]
        return [value]
    for (name, one), (other_name, two) in zip(a.parts().items(), b.parts().items(), strict=True):
        assert name == other_name
        for u, v in zip(flat(training._state_of(one)), flat(training._state_of(two)), strict=True):
            same = torch.equal(u, v) if isinstance(u, torch.Tensor) else u == v
            assert same, f"{name}: {u} and {v}"


def start(learn: Learner, epochs: int = 3):
    "Fit from one and the same state of torch's generator."
    torch.manual_seed(7)
    return learn.fit(epochs)


class Stop(Callback):
    "Interrupts at some event of some step."

    def __init__(self, event, step, error=KeyboardInterrupt):
        self.step, self.error, self.done = step, error, False
        setattr(self, event, self._act)

    def _act(self, learn):
        if learn.step == self.step and not self.done:
            self.done = True
            raise self.error


# --- DataLoader

@given(n=st.integers(1, 40), batch_size=st.integers(1, 50), shuffle=st.booleans(), drop_last=st.booleans(), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_loader_gives_every_example_once(n, batch_size, shuffle, drop_last, seed):
    x, y = torch.arange(n)[:, None] * torch.ones(1, 2), torch.arange(n)
    if drop_last and n < batch_size:
        with pytest.raises(ValueError, match="drop_last"): DataLoader(x, y, batch_size, drop_last=True)
        return
    loader = DataLoader(x, y, batch_size, shuffle, drop_last, torch.Generator().manual_seed(seed))
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == (n // batch_size if drop_last else math.ceil(n / batch_size))
        assert all(len(xb) == len(yb) == batch_size for xb, yb in batches[:-1])
        for xb, yb in batches: assert torch.equal(xb[:, 0].long(), yb)
        seen = torch.cat([yb for _, yb in batches])
        assert len(seen.unique()) == len(seen) == (len(loader) * batch_size if drop_last else n)
        if not shuffle: assert torch.equal(seen, y[: len(seen)])


@given(shuffle=st.booleans(), epochs=st.integers(0, 2), used=st.integers(0, 4), drop_last=st.booleans())
@settings(max_examples=40, deadline=None)
def test_loader_resumes_in_the_middle_of_an_epoch(shuffle, epochs, used, drop_last):
    x, y = torch.arange(18.)[:, None], torch.arange(18)
    def make(seed): return DataLoader(x, y, 4, shuffle, drop_last, torch.Generator().manual_seed(seed))
    one, two = make(3), make(4)
    for _ in range(epochs): list(one)
    batches = iter(one)
    for _ in range(used): next(batches)
    two.load_state_dict(one.state_dict())
    if used == 0: batches = iter(one)
    for a, b in zip(list(batches), list(two), strict=True): assert torch.equal(a[1], b[1])
    for a, b in zip(list(one), list(two), strict=True): assert torch.equal(a[1], b[1])


def test_loader_orders_differ_from_epoch_to_epoch_and_follow_the_seed():
    def orders(seed, epochs=3):
        loader = DataLoader(X, Y, 16, shuffle=True, generator=torch.Generator().manual_seed(seed))
        return [torch.cat([x for x, _ in loader]) for _ in range(epochs)]
    a, b, c = orders(0), orders(0), orders(1)
    assert all(map(torch.equal, a, b)) and not torch.equal(a[0], a[1]) and not torch.equal(a[0], c[0])
    torch.manual_seed(5)
    first = DataLoader(X, Y, shuffle=True)
    torch.manual_seed(5)
    assert torch.equal(next(iter(first))[0], next(iter(DataLoader(X, Y, shuffle=True)))[0])


def test_loader_of_its_own_generator_leaves_the_global_one_alone():
    loader = DataLoader(X, Y, shuffle=True)
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("args, error, text", [
    ((X, Y[:-1]), ValueError, "90 examples in x, but 89 in y"), ((X[:0], Y[:0]), ValueError, "no examples"),
    ((X, Y, 0), ValueError, "batch_size is 0"), ((X, Y, -1), ValueError, "batch_size"), ((X, Y, 1.5), ValueError, "batch_size"),
    ((X, Y, True), ValueError, "batch_size"), ((X.tolist(), Y), TypeError, "x is a list"), ((X, Y.numpy()), TypeError, "y is a"),
    ((torch.tensor(1.), Y), ValueError, "first dimension"),
])
def test_loader_errors(args, error, text):
    with pytest.raises(error, match=text): DataLoader(*args)


def test_loader_refuses_the_state_of_another_one():
    loader, state = DataLoader(X, Y, 16, shuffle=True), DataLoader(X[1:], Y[1:], 16, shuffle=True).state_dict()
    before = loader.state_dict()
    with pytest.raises(ValueError, match="n was 89 and is 90"): loader.load_state_dict(state)
    for wrong in ({"batch": 7}, {"batch": -1}, {"seed": "x"}, {"generator": torch.zeros(3)}, {"generator": None}, {"seed": -1}):
        with pytest.raises(ValueError): loader.load_state_dict({**before, **wrong})
    with pytest.raises(ValueError): loader.load_state_dict(None)
    assert torch.equal(before["generator"], loader.generator.get_state())


# --- fit

def test_fit_is_the_loop_written_out():
    a, b = (learner(schedule=False, opt="SGD") for _ in range(2))
    torch.manual_seed(9)
    losses = fit(a.model, a.loader, a.opt, 2)
    torch.manual_seed(9)
    for _ in range(2):
        for x, y in b.loader:
            b.opt.zero_grad()
            b.model(x, y)
            b.model.backward()
            b.opt.step()
    for p, q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)
    assert len(losses) == 2 and losses[1] < losses[0]


def test_fit_and_learner_agree_and_neither_begins_again():
    a, b = learner(schedule=False), learner(schedule=False)
    torch.manual_seed(9)
    losses = fit(a.model, a.loader, a.opt, 1) + fit(a.model, a.loader, a.opt, 1)
    torch.manual_seed(9)
    b.fit(1)
    b.fit(1)
    for p, q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)
    assert_close(b.history.epochs["loss"], losses)


def test_fit_takes_a_pair_of_tensors():
    model = Model(Sequential(Linear(2, 3)), CrossEntropyLoss())
    fit(model, (X, Y), SGD(model.parameters(), lr=0.1), 1)
    with pytest.raises(TypeError, match="data is a Tensor"): fit(model, X, SGD(model.parameters(), lr=0.1), 1)


def test_training_equals_torch():
    a = learner(schedule=False, opt="SGD")
    net = Sequential(*(m for m in a.model.net if not isinstance(m, RandomMask)))
    theirs = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    theirs.load_state_dict(net.state_dict())
    opt = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    ours = Model(net, CrossEntropyLoss())
    fit(ours, DataLoader(X, Y, 16), SGD(ours.parameters(), lr=0.1, momentum=0.9), 2)
    for _ in range(2):
        for x, y in DataLoader(X, Y, 16):
            opt.zero_grad()
            torch.nn.functional.cross_entropy(theirs(x), y).backward()
            opt.step()
    for p, q in zip(ours.parameters(), theirs.parameters()): assert_close(p.data, q.data, atol=1e-5, rtol=1e-4)


# --- Learner

def test_add_fit_predict():
    torch.manual_seed(0)
    learn = Learner(Model(Sequential(), CrossEntropyLoss()), lambda params: Adam(params, lr=5e-2), (X, Y))
    learn.add(Linear(2, 30)).add(ReLU()).add(Linear(30, 3)).add(ProgressBar())
    weights = [p.clone() for p in learn.model.parameters()]
    learn.fit(1)
    assert len(weights) == 4 and not any(torch.equal(p, q) for p, q in zip(weights, learn.model.parameters()))
    learn.fit(60)
    out = learn.predict(X)
    assert out.shape == (90, 3) and accuracy(out, Y) > 0.9 and learn.epoch == 61
    assert len(learn.history.epochs["loss"]) == 61 and learn.history.epochs["loss"][-1] < learn.history.epochs["loss"][0]
    learn.add(Linear(3, 3))
    last = learn.model.net[-1].weight.clone()
    learn.fit(1)
    assert not torch.equal(last, learn.model.net[-1].weight), "a layer that came later is trained too"


def test_predict_disturbs_nothing():
    learn = learner()
    learn.fit(1)
    learn.model.net[0].training = False  # a frozen layer stays as it is
    before, random = {k: t.clone() for k, t in learn.model.state_dict().items()}, torch.get_rng_state()
    a, b = learn.predict(X), learn.predict(X, batch_size=7)
    assert_close(a, b)
    assert torch.equal(a, learn.predict(X)), "in eval mode nothing is random"
    assert torch.equal(random, torch.get_rng_state()) and not learn.model.net[0].training and learn.model.net[2].training
    for k, t in learn.model.state_dict().items(): assert torch.equal(t, before[k])
    with pytest.raises(RuntimeError, match="without a forward"): learn.model.backward()


def test_learner_errors():
    model = Model(Sequential(Linear(2, 3)), CrossEntropyLoss())
    opt = SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="Model"): Learner(model.net, opt, (X, Y))
    with pytest.raises(TypeError, match="Optimizer"): Learner(model, 0.1, (X, Y))
    with pytest.raises(TypeError, match="data"): Learner(model, opt, X)
    with pytest.raises(TypeError, match="Callback"): Learner(model, opt, (X, Y), callbacks=[History])
    learn = Learner(model, opt, (X, Y))
    for epochs in (0, -1, 1.0, True, "2"):
        with pytest.raises(ValueError, match="epochs"): learn.fit(epochs)
    with pytest.raises(ValueError, match="how many"): learn.fit()
    with pytest.raises(TypeError): learn.predict([[1., 2.]])
    with pytest.raises(TypeError, match="a Sequential"): Learner(Model(Linear(2, 3), CrossEntropyLoss()), opt, (X, Y)).add(ReLU())


def test_events_come_in_order():
    heard = []
    class Listener(Callback): pass
    for event in training.EVENTS: setattr(Listener, event, lambda self, learn, event=event: heard.append((event, learn.step)))
    learn = Learner(Model(Sequential(Linear(2, 3)), CrossEntropyLoss()), lambda p: SGD(p, lr=0.1), DataLoader(X, Y, 45), callbacks=[Listener()])
    learn.fit(1)
    step = ["before_batch", "after_forward", "after_backward", "after_step"]
    assert [event for event, _ in heard] == ["before_fit", "before_epoch", *step, *step, "after_epoch", "after_fit"]
    assert [n for event, n in heard if event == "after_step"] == [1, 2]
    with pytest.raises(TypeError, match="after_stp would never be called"):
        type("Wrong", (Callback,), {"after_stp": lambda self, learn: None})


def test_any_sized_iterable_serves_but_cannot_be_saved(tmp_path):
    batches = [(X[:45], Y[:45]), (X[45:], Y[45:])]
    learn = Learner(Model(Sequential(Linear(2, 3)), CrossEntropyLoss()), lambda p: SGD(p, lr=0.1), batches, callbacks=[Stop("after_step", 3)])
    learn.fit(2)
    assert (learn.epoch, learn.batch) == (1, 1)
    learn.fit()
    assert (learn.epoch, learn.batch, learn.step) == (2, 0, 4)
    with pytest.raises(TypeError, match="cannot say where it is"): learn.save(tmp_path / "x")


# --- callbacks

def test_history_table_and_plot():
    learn = learner([Metrics(accuracy=accuracy)], epochs=12)
    assert "no whole epoch" in repr(learn.history)
    with pytest.raises(ValueError, match="nothing to plot"): learn.history.plot()
    history = learn.fit(12)
    assert list(history.epochs) == ["loss", "valid_loss", "accuracy"] and all(len(v) == 12 for v in history.epochs.values())
    assert len(history.steps["loss"]) == len(history.steps["lr"]) == 72
    assert history.steps["lr"][0] < max(history.steps["lr"]) == pytest.approx(2e-2, rel=0.1)
    assert "…" in repr(history) and len(repr(history).splitlines()) == 12
    assert_close(history.epochs["loss"][3], sum(history.steps["loss"][18:24]) / 6)
    assert len(history.plot()) == 2


def test_metrics_are_those_of_the_whole_set():
    learn = learner([Metrics(accuracy=accuracy)], schedule=False)
    learn.valid = DataLoader(X, Y, 7)
    learn.fit(1)
    out = learn.predict(X)
    assert learn.values["accuracy"] == pytest.approx(accuracy(out, Y).item())
    assert learn.values["valid_loss"] == pytest.approx(CrossEntropyLoss()(out, Y).item())
    learn = Learner(learn.model, learn.opt, (X, Y), callbacks=[Metrics()])
    with pytest.raises(ValueError, match="no validation set"): learn.fit(1)


def test_metrics_do_not_change_the_run():
    a, b = learner([Metrics(accuracy=accuracy), ActivationStats(every=2)]), learner()
    start(a)
    start(b)
    for p, q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)


def test_schedule_by_step_and_by_epoch():
    learn = learner(schedule=False, opt="SGD")
    learn.add(Schedule(StepLR(learn.opt, 1, gamma=0.5), every="epoch"))
    learn.fit(2)
    assert learn.history.steps["lr"] == [0.1] * 6 + [0.05] * 6
    other = learner(schedule=False)
    other.add(Schedule(StepLR(learn.opt, 1)))
    with pytest.raises(ValueError, match="another optimiser"): other.fit(1)
    with pytest.raises(ValueError, match="every"): Schedule(StepLR(learn.opt, 1), every="batch")


def test_clipping():
    clip = ClipGradNorm(0.01)
    seen = []
    class Look(Callback):
        order = 99
        def after_backward(self, learn): seen.append(math.sqrt(sum(p.g.square().sum().item() for p in learn.model.parameters())))
    learner([clip, Look()]).fit(1)
    assert len(clip.norms) == 6 and max(clip.norms) > 0.01 and max(seen) <= 0.01 + 1e-6


def test_early_stopping_goes_back_to_the_best():
    worst = iter([3., 1., 2., 2., 2., 2.])
    learn = learner([Metrics(mine=lambda out, y: next(worst)), EarlyStopping(patience=2, monitor="mine")], schedule=False)
    kept = {}
    class Keep(Callback):
        def after_epoch(self, learn): kept[learn.epoch] = {k: t.clone() for k, t in learn.model.state_dict().items()}
    learn.add(Keep())
    learn.fit(6)
    assert learn.epoch == 4 and "mine has not become better than 1" in learn.stopped
    for k, t in learn.model.state_dict().items(): assert torch.equal(t, kept[2][k])
    learn.fit()  # nothing was left
    assert learn.epoch == 4
    missing = learner([EarlyStopping()])
    with pytest.raises(ValueError, match="valid_loss"): missing.fit(1)
    for wrong in (dict(patience=0), dict(mode="low")):
        with pytest.raises(ValueError): EarlyStopping(**wrong)
    worst = iter([9., 9.])
    learn.fit(2)  # asked for all the same: with new patience
    assert learn.epoch == 6  # two epochs, the second of which uses it up


def test_early_stopping_forgets_a_nan():
    values = iter([math.nan, 3., 2., 4., math.nan])
    stop = EarlyStopping(patience=2, monitor="mine")
    learn = learner([Metrics(mine=lambda out, y: next(values)), stop], schedule=False)
    learn.fit(5)
    assert learn.epoch == 5 and stop.best == 2 and "than 2 for 2" in learn.stopped


def test_watch_sees_each_layer_and_leaves_no_trace():
    learn = learner()
    seen = []
    with watch(learn.model.net, lambda name, layer, args, out: seen.append((name, type(layer).__name__, tuple(out.shape)))):
        learn.model.net(X)
        assert list(learn.model.net.state_dict())  # names are still found
    assert seen == [("0", "Linear", (90, 16)), ("1", "ReLU", (90, 16)), ("2", "RandomMask", (90, 16)), ("3", "Linear", (90, 3))]
    assert not any("forward" in m.__dict__ for m in learn.model.modules())
    with pytest.raises(ZeroDivisionError), watch(learn.model.net, lambda *a: 1 / 0): learn.model.net(X)
    assert not any("forward" in m.__dict__ for m in learn.model.modules())


def test_activation_stats():
    stats = ActivationStats(every=3)
    learn = learner([stats])
    learn.fit(2)
    assert stats.steps == [0, 3, 6, 9] and list(stats.stats) == ["0 Linear", "1 ReLU", "2 RandomMask", "3 Linear"]
    relu = stats.stats["1 ReLU"]
    assert not any(stats.stats["0 Linear"]["zeros"])  # its own numbers, though Sequential gives them up after the ReLU
    assert all(0 < z < 1 for z in relu["zeros"]) and all(g > 0 and math.isfinite(g) for g in relu["grad"])
    assert len(plot_stats(stats, ("mean", "std", "zeros", "grad"))) == 4
    assert not any("forward" in m.__dict__ for m in learn.model.modules())


def test_progress_bar_in_a_terminal(capsys):
    learner([ProgressBar()]).fit(3)
    err = capsys.readouterr().err
    assert "epoch 3/3" in err and "18/18" in err and "loss " in err


# --- NaN

def stopped_by(learn, epochs=3):
    with pytest.raises(NonFiniteError) as caught: start(learn, epochs)
    return caught.value


def test_nan_in_the_data():
    learn = learner(shuffle=False)
    learn.loader.x = X.clone()
    learn.loader.x[35, 1] = math.nan
    error = stopped_by(learn)
    assert error.step == 3 and error.where == "batch x" and "rows [3]" in str(error) and "step 3 (epoch 1)" in str(error)
    learn.loader.x = X
    learn.fit()  # the step was taken back: the run can go on
    other = learner(shuffle=False)
    start(other)
    assert_same(learn, other)


def test_nan_by_a_learning_rate_that_is_too_high():
    torch.manual_seed(0)
    model = Model(Sequential(Linear(2, 16), ReLU(), Linear(16, 1)), MSELoss())
    learn = Learner(model, SGD(model.parameters(), lr=50.0), (X, X.sum(1, keepdim=True)))
    error = stopped_by(learn, 100)
    assert "learning rate, 50, is too high" in str(error) and error.step == learn.step + 1
    assert all(p.isfinite().all() for p in model.parameters()), "the weights are those before"


def test_nan_names_the_layer():
    learn = learner(schedule=False)
    with torch.no_grad(): learn.model.net[3].weight.fill_(3e38)
    error = stopped_by(learn)
    assert error.step == 1 and error.where.startswith("net.3 Linear") and "3e+38" in str(error)
    with torch.no_grad(): learn.model.net[0].bias[2] = math.nan
    assert stopped_by(learn).where == "net.0.bias"


def test_nan_in_gradients_alone():
    class Bad(ReLU):
        def bwd(self, out, input): add_grad(input, out.g * math.inf)
    torch.manual_seed(0)
    learn = Learner(Model(Sequential(Linear(2, 5), Bad(), Linear(5, 3)), CrossEntropyLoss()), lambda p: SGD(p, lr=0.1), (X, Y))
    before = [p.clone() for p in learn.model.parameters()]
    error = stopped_by(learn)
    assert error.where == "net.0.bias" and "gradients are not finite" in str(error)
    for p, q in zip(learn.model.parameters(), before): assert torch.equal(p, q)


# --- interruption and resumption

@pytest.mark.parametrize("event", ["before_epoch", "before_batch", "after_forward", "after_backward", "after_step", "after_epoch"])
@pytest.mark.parametrize("step", [0, 3, 6, 11])
def test_interrupted_anywhere_and_resumed_in_the_same_process(event, step):
    stop = Stop(event, step)
    learn, whole = learner([stop]), learner()
    start(learn)
    assert learn.stopped == ("interrupted" if stop.done else None)
    learn.fit()
    start(whole)
    assert_same(learn, whole)


@pytest.mark.parametrize("opt", OPTIMISERS)
@pytest.mark.parametrize("step", [1, 5, 6, 7, 12, 17])
def test_saved_at_any_step_and_resumed_elsewhere(tmp_path, opt, step):
    path = tmp_path / "run.safetensors"
    extra = lambda: [Metrics(accuracy=accuracy), EarlyStopping(patience=9)]
    first = learner([*extra(), Stop("after_step", step)], opt)
    start(first)
    first.save(path)
    whole = learner(extra(), opt)
    start(whole)
    resumed = learner(extra(), opt, seed=123)  # other weights, another order, another state of everything
    torch.rand(step)
    assert resumed.load(path) == {}
    resumed.fit()
    assert_same(resumed, whole)
    assert resumed.history.epochs == whole.history.epochs and resumed.history.steps == whole.history.steps


def test_resumed_in_another_process_with_checkpoints_on_the_way(tmp_path):
    path = tmp_path / "run.safetensors"
    code = f"""
import sys, os
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_training import *
class Die(Callback):
    order = 99
    def after_step(self, learn):
        if learn.step == 10: os.kill(os.getpid(), signal.SIGKILL)
start(learner([Checkpoint({str(path)!r}, every=4, unit="step"), Die()]))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    resumed, whole = learner([Checkpoint(path, every=4, unit="step")], seed=5), learner()
    resumed.load(path)
    assert resumed.step == 8
    resumed.fit()
    start(whole)
    assert_same(resumed, whole)


def test_a_shared_generator_is_resumed_too(tmp_path):
    whole, first, resumed = (learner(generator=torch.default_generator, seed=s) for s in (0, 0, 1))
    first.add(Stop("after_step", 8))
    start(first)
    first.save(tmp_path / "x")
    start(whole)
    resumed.load(tmp_path / "x")
    resumed.fit()
    assert_same(resumed, whole)


def test_ctrl_c_ends_after_the_step_under_way():
    learn, whole = learner(), learner()
    class Press(Callback):
        def after_forward(self, learn):
            if learn.step == 7 and not learn.stopped: signal.raise_signal(signal.SIGINT)
    learn.add(Press())
    history = start(learn)
    assert learn.stopped == "interrupted" and learn.step == 8 and len(history.steps["loss"]) == 8
    assert len(history.epochs["loss"]) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    learn.fit()
    start(whole)
    assert_same(learn, whole)


def test_a_second_ctrl_c_does_not_wait():
    learn, whole = learner(), learner()
    class Press(Callback):
        pressed = 0
        def after_forward(self, learn):
            if self.pressed == 0 and learn.step == 7:
                self.pressed = 1
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
    learn.add(Press())
    start(learn)
    assert learn.step == 7 and learn.stopped == "interrupted"
    learn.fit()
    start(whole)
    assert_same(learn, whole)


def test_a_torn_step_is_not_saved(tmp_path):
    learn = learner()
    def torn(*args): raise KeyboardInterrupt
    learn.opt.update = torn
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    with pytest.raises(RuntimeError, match="in the middle of a step"): learn.save(tmp_path / "x")
    assert not os.listdir(tmp_path)


def test_fit_works_in_another_thread():
    learn = learner()
    thread = threading.Thread(target=learn.fit, args=(1,))
    thread.start()
    thread.join()
    assert learn.step == 6


def test_an_error_takes_the_step_back():
    learn, whole = learner([Stop("after_backward", 4, ZeroDivisionError)]), learner()
    with pytest.raises(ZeroDivisionError): start(learn)
    assert all(p.g is None for p in learn.model.parameters())
    learn.fit()
    start(whole)
    assert_same(learn, whole)


# --- pictures

def test_pictures():
    learn = learner()
    learn.fit(1)
    for model in (learn, learn.model, learn.model.net, lambda x: learn.predict(x)): plot_decision_boundary(model, X, Y, steps=20)
    for x, y in ((X[:, :1], Y), (X, Y[:5]), (X[None], Y)):
        with pytest.raises(ValueError, match="plot_decision_boundary"): plot_decision_boundary(learn, x, y)
    out = torch.eye(3)[torch.tensor([0, 1, 2, 2])]
    target = torch.tensor([0, 1, 1, 2])
    assert confusion_matrix(out, target).tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]
    plot_confusion(out, target)
    plot_worst(torch.rand(4, 64), out, target)
    some = torch.tensor([0, 1, -100, 2])  # as in accuracy, -100 is to be ignored
    assert confusion_matrix(out, some).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match="no mistake"): plot_worst(torch.rand(4, 64), out, some)
    with pytest.raises(ValueError, match="no mistake"): plot_worst(torch.rand(4, 64), out, torch.tensor([0, 1, 2, 2]))


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    import matplotlib.pyplot as plt
    plt.close("all")


def test_importing_takes_neither_matplotlib_nor_the_others_along():
    code = "import sys, torch; before = set(sys.modules); import fromfound.training; print([m for m in ('matplotlib', 'tqdm', 'safetensors', 'fastcore') if m in set(sys.modules) - before])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
