"""Batches, the loop, callbacks; runs that are stopped, killed, saved and resumed to the last bit; files that are whole."""
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from fromfound.backward import add_grad
from fromfound.data import digits, spiral
from fromfound.forward import accuracy
from fromfound.layers import CrossEntropyLoss, Linear, Model, Module, MSELoss, ReLU, Sequential
from fromfound.optim import SGD, Adam, AdamW, RMSprop, clip_grad_norm_, cosine, one_cycle
from fromfound.training import (
    EVENTS, ActivationStats, Callback, Checkpoint, ClipGradNorm, DataLoader, EarlyStopping, History, Learner, Metrics, NaNGuard,
    ProgressBar, Schedule, evaluating, fit, load, plot_decision_boundary, save, watch,
)

X, Y = spiral(30, generator=torch.Generator().manual_seed(1))  # 90 points: 6 batches of 16, the last of 10
OPTIMISERS = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), "Adam": lambda p: Adam(p, lr=1e-2, amsgrad=True),
    "AdamW": lambda p: AdamW(p, lr=1e-2), "RMSprop": lambda p: RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
}


@pytest.fixture(autouse=True)
def one_thread_and_no_figures_left():
    torch.set_num_threads(1)
    yield
    plt.close("all")


class RandomMask(Module):
    "Like dropout: in training it zeros numbers by torch's own generator. Keeps a running mean, like a norm layer."
    def __init__(self): self.seen = torch.zeros(())

    def forward(self, input):
        if not self.training: return input * 1
        mask = (torch.rand_like(input) < 0.8) / 0.8
        self.seen.mul_(0.9).add_(input.mean(), alpha=0.1)
        out = input * mask
        out.saved = mask
        return out

    def bwd(self, out, input): add_grad(input, out.g * out.saved)


def learner(*callbacks, optimizer="Adam", seed=0, net=None, data=None):
    torch.manual_seed(seed)
    model = Model(net or Sequential(Linear(2, 16), ReLU(), RandomMask(), Linear(16, 3)), CrossEntropyLoss())
    data = data or DataLoader(X, Y, 16, shuffle=True)
    if not any(isinstance(c, History) for c in callbacks): callbacks = [History(0), *callbacks]
    return Learner(model, OPTIMISERS[optimizer](model.parameters()), data, (X, Y), [Schedule(one_cycle), *callbacks])


def assert_same(a, b):
    "Everything that decides how a run goes on is equal to the last bit."
    def flat(value):
        if isinstance(value, dict): return [z for k, v in value.items() for z in (k, *flat(v))]
        return [z for v in value for z in flat(v)] if isinstance(value, (list, tuple)) else [value]
    for u, v in zip(flat(a.state_dict()), flat(b.state_dict()), strict=True):
        assert torch.equal(u, v) if isinstance(u, torch.Tensor) else u == v or u != u


# ---- DataLoader and fit

@given(n=st.integers(1, 40), batch_size=st.integers(1, 50), shuffle=st.booleans(), drop_last=st.booleans(), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_loader_gives_every_example_once(n, batch_size, shuffle, drop_last, seed):
    x, y = torch.randn(n, 2), torch.arange(n)
    if drop_last and n < batch_size:
        with pytest.raises(ValueError, match=f"{n} examples aren't enough for a batch"): DataLoader(x, y, batch_size, drop_last=True)
        return
    loader = DataLoader(x, y, batch_size, shuffle, drop_last, seed)
    for epoch in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) and all(torch.equal(xb, x[yb]) for xb, yb in batches)
        assert all(len(yb) == batch_size for _, yb in batches[:-1])
        seen = torch.cat([yb for _, yb in batches])
        assert len(seen.unique()) == len(seen) == (n // batch_size * batch_size if drop_last else n)
        if not shuffle: assert torch.equal(seen, torch.arange(len(seen)))
        for start in range(len(loader)):
            for a, b in zip(loader.batches(epoch, start), batches[start:], strict=True): assert torch.equal(a[1], b[1])


def test_the_order_is_a_function_of_seed_and_epoch():
    def orders(loader): return [torch.cat([y for _, y in loader]).tolist() for _ in range(3)]
    x, y = torch.zeros(50), torch.arange(50)
    torch.manual_seed(5)
    drawn = DataLoader(x, y, 16, shuffle=True)
    torch.manual_seed(5)
    assert orders(drawn) == orders(DataLoader(x, y, 16, shuffle=True))  # torch.manual_seed decides
    one = DataLoader(x, y, 16, shuffle=True, seed=3)
    first = orders(one)
    torch.rand(7)
    assert orders(DataLoader(x, y, 16, shuffle=True, seed=3)) == first != orders(DataLoader(x, y, 16, shuffle=True, seed=4))
    assert len({tuple(order) for order in first}) == 3
    kinds = {tuple(y for _, ys in DataLoader(x, y, shuffle=True, seed=s).batches(e) for y in ys.tolist()) for s in range(3) for e in range(2000)}
    assert len(kinds) == 6000  # no two pairs (seed, epoch) share an order
    with pytest.raises(ValueError, match="90 examples in x, but 89 in y"): DataLoader(X, Y[1:])
    with pytest.raises(ValueError, match="0 examples"): DataLoader(X[:0], Y[:0])


def test_fit_is_the_loop_and_goes_on_where_it_ended():
    one, two = learner(net=Sequential(Linear(2, 5), ReLU(), Linear(5, 3))), learner(net=Sequential(Linear(2, 5), ReLU(), Linear(5, 3)))
    two.model.load_state_dict(one.model.state_dict())
    losses = fit(one.model, DataLoader(X, Y, 16, shuffle=True, seed=1), one.optimizer, 3)
    by_hand, loader = [], DataLoader(X, Y, 16, shuffle=True, seed=1)
    for _ in range(3):
        total = 0
        for x, y in loader:
            two.optimizer.zero_grad()
            total += two.model(x, y).item() * len(x)
            two.model.backward()
            two.optimizer.step()
        by_hand.append(total / len(X))
    assert losses == pytest.approx(by_hand)
    for p, q in zip(one.model.parameters(), two.model.parameters()): assert torch.equal(p, q)
    assert fit(one.model, (X, Y), one.optimizer)[0] < losses[0]


def test_training_is_torchs():
    ours = Sequential(Linear(2, 20), ReLU(), Linear(20, 3))
    theirs = nn.Sequential(nn.Linear(2, 20), nn.ReLU(), nn.Linear(20, 3))
    theirs.load_state_dict(ours.state_dict())
    model, loader = Model(ours, CrossEntropyLoss()), DataLoader(X, Y, 16, shuffle=True, seed=0)
    learn = Learner(model, SGD(model.parameters(), lr=0.1, momentum=0.9), loader, callbacks=[History(0)])
    learn.fit(5)
    optimizer, losses = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9), []
    for epoch in range(5):
        for x, y in loader.batches(epoch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(theirs(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert_close(learn.history.steps["loss"], losses, rtol=1e-4, atol=1e-5)


# ---- Learner

def test_events_come_in_order_and_misspelt_ones_are_refused():
    heard = []
    listener = type("Listener", (Callback,), {e: (lambda self, learn, e=e: heard.append(e)) for e in EVENTS})()
    learner(listener, data=DataLoader(X, Y, 50)).fit(1)
    batch = ["before_batch", "after_forward", "after_backward", "after_step"]
    assert heard == ["before_fit", "before_epoch", *batch, *batch, "after_epoch", "after_fit"]
    with pytest.raises(TypeError, match="Wrong.after_stp would never be called: the events are before_fit"):
        type("Wrong", (Callback,), {"after_stp": lambda self, learn: None})


def test_valid_gives_valid_loss_and_metrics_are_those_of_the_whole_set():
    learn = learner(Metrics(accuracy=accuracy), data=DataLoader(X, Y, 50))
    learn.valid = DataLoader(X, Y, 7)
    learn.fit(2)
    with evaluating(learn.model): loss = learn.model.loss_func(learn.model.net(X), Y)
    row = learn.history.rows[-1]
    assert list(row) == ["loss", "valid_loss", "accuracy"]
    assert row["valid_loss"] == pytest.approx(loss.item(), rel=1e-5) and row["accuracy"] == pytest.approx(accuracy(learn.predict(X), Y).item())
    model = learn.model
    alone = Learner(model, learn.optimizer, (X, Y), callbacks=[History(0), EarlyStopping()])
    with pytest.raises(ValueError, match="no value is called 'valid_loss'; there are loss"): alone.fit(1)
    with pytest.raises(ValueError, match="Metrics needs a validation set"):
        Learner(model, learn.optimizer, (X, Y), callbacks=[Metrics(accuracy=accuracy)]).fit(1)


def test_validation_and_prediction_disturb_nothing():
    class Peek(Callback):
        def after_forward(self, learn): learn.predict(X[:3]), learn._validate()
    learn = learner(Peek())
    learn.values = {}
    learn.fit(2)
    whole = learner()
    whole.fit(2)
    for p, q in zip(learn.model.parameters(), whole.model.parameters()): assert torch.equal(p, q)
    assert learn.model.training and learn.predict(X, batch_size=7).shape == (90, 3)
    assert_close(learn.predict(X, batch_size=7), learn.predict(X))


def test_what_a_learner_refuses():
    model = Model(Linear(2, 3), CrossEntropyLoss())
    with pytest.raises(TypeError, match="one of fromfound.optim: they go by .g, torch's by .grad"):
        Learner(model, torch.optim.SGD(model.parameters()), (X, Y))
    with pytest.raises(ValueError, match="the optimizer holds another model"): Learner(model, SGD(Linear(2, 3).parameters()), (X, Y))
    with pytest.raises(ValueError, match="how many epochs"): Learner(model, SGD(model.parameters()), (X, Y)).fit()


def test_torchs_own_loader_works_and_resumes_at_an_epochs_boundary():
    dataset = torch.utils.data.TensorDataset(X, Y)
    def make(*callbacks, seed=0): return learner(*callbacks, seed=seed, data=torch.utils.data.DataLoader(dataset, 16, shuffle=True))
    whole, first, resumed = make(), make(), make(seed=9)
    whole.fit(3)
    first.epochs = 3
    class EndOfEpoch(Callback):
        def after_epoch(self, learn):
            if learn.epoch == 2: learn.stop()
    first.callbacks.append(EndOfEpoch())
    torch.manual_seed(0), make()
    first.fit(3)
    resumed.load_state_dict({k: v for k, v in first.state_dict().items()})
    assert (resumed.epoch, resumed.batch) == (2, 0)
    resumed.fit()
    assert resumed.epoch == 3 and resumed.step == 18 == whole.step
    middle = make()
    class Middle(Callback):
        def after_step(self, learn):
            if learn.step == 8: learn.stop()
    middle.callbacks.append(Middle())
    middle.fit(2)
    assert (middle.epoch, middle.batch) == (1, 2)
    middle.callbacks.pop()
    middle.fit()
    assert middle.epoch == 2 and middle.step == 14  # the epoch that was stopped began anew


def test_history_prints_a_row_per_epoch_and_plots(capsys):
    learn = learner(History(), Metrics(accuracy=accuracy))
    learn.fit(3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["epoch", "loss", "valid_loss", "accuracy", "time"] and len(lines) == 4
    assert lines[2].split()[:4] == ["2", *(f"{learn.history.rows[1][n]:.4f}" for n in ("loss", "valid_loss", "accuracy"))]
    learner(History(every=2)).fit(5)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["epoch", "2", "4", "5"]
    assert len(learn.history.plot()) == 2 and len(learn.history.steps["loss"]) == len(learn.history.steps["lr"]) == 18
    assert learn.history.epochs["accuracy"] == [row["accuracy"] for row in learn.history.rows]


def test_the_printed_and_plotted_history_needs_no_style():
    learn = learner()
    learn.fit(2)
    figure = learn.history.plot()[0].figure
    figure.canvas.draw()
    inside = figure.bbox
    for ax in figure.axes:
        for label in (ax.xaxis.label, ax.yaxis.label): assert inside.contains(*label.get_window_extent().min)


def test_schedule_knows_the_length_of_the_run():
    learn = learner(data=DataLoader(X, Y, 16, seed=0))
    learn.fit(4)
    assert learn.history.steps["lr"] == pytest.approx([0.01 * one_cycle(t / 24) for t in range(24)])
    learn.fit(2)  # another run, from its own beginning
    assert learn.history.steps["lr"][24:] == pytest.approx([0.01 * one_cycle(t / 12) for t in range(12)])


def test_schedule_keeps_the_ratio_of_the_groups():
    model = Model(Linear(2, 3), CrossEntropyLoss())
    optimizer, ratios = SGD([{"params": [model.net.weight]}, {"params": [model.net.bias], "lr": 0.5}], lr=0.1), []
    class Look(Callback):
        def after_step(self, learn): ratios.append(optimizer.param_groups[1]["lr"] / optimizer.param_groups[0]["lr"])
    Learner(model, optimizer, (X, Y), callbacks=[Schedule(cosine), Look(), History(0)]).fit(2)
    assert len(ratios) == 4 and ratios == pytest.approx([5] * 4)


def test_schedule_gives_the_lr_back_and_takes_a_new_one():
    learn = learner(at := At("after_forward", 0, lambda: 1 / 0), data=DataLoader(X, Y, 16, seed=0))
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    learn.callbacks.remove(at)
    learn.fit(1)  # the failed step left the lr where one_cycle begins: that isn't the base
    assert learn.history.steps["lr"] == pytest.approx([0.01 * one_cycle(t / 6) for t in range(6)])
    assert learn.optimizer.param_groups[0]["lr"] == 0.01
    learn.optimizer.param_groups[0]["lr"] = 0.1  # set by hand between two fits
    learn.fit(1)
    assert learn.history.steps["lr"][6:] == pytest.approx([0.1 * one_cycle(t / 6) for t in range(6)])


def test_clipping():
    clip, seen = ClipGradNorm(0.2), []
    class Look(Callback):
        order = 40
        def after_backward(self, learn): seen.append(clip_grad_norm_(learn.model.parameters(), math.inf).item())
    learner(clip, Look()).fit(1)
    assert len(clip.norms) == 6 and max(clip.norms) > 0.2 and max(seen) <= 0.2001


def test_early_stopping_goes_back_to_the_best(capsys):
    class Worse(Callback):
        order = -1
        def after_epoch(self, learn): learn.values["valid_loss"] = [3.0, 1.0, 2.0, math.nan, 1.5, 0.1][learn.epoch - 1]
    class Keep(Callback):
        weights = {}
        def after_epoch(self, learn): self.weights[learn.epoch] = [p.clone() for p in learn.model.parameters()]
    keep = Keep()
    learn = learner(Worse(), EarlyStopping(patience=3), keep)
    learn.fit(6)
    assert learn.epoch == 5 and "no valid_loss was better than 1.0000 for 3 epochs" in capsys.readouterr().out
    for p, q in zip(learn.model.parameters(), keep.weights[2]): assert torch.equal(p, q)
    with pytest.raises(ValueError, match="mode is 'most'"): EarlyStopping(mode="most")


def test_progress_bar(capsys):
    learner(ProgressBar(), History()).fit(2)
    captured = capsys.readouterr()
    assert "epoch 1/2" in captured.err and "epoch 2/2" in captured.err and "/6 [" in captured.err
    assert captured.err.rstrip(" ").endswith("\r") and len(captured.out.splitlines()) == 3  # the bars are gone, the rows stay


def test_watch_and_activation_stats():
    net, seen = Sequential(Linear(2, 4), ReLU(), Sequential(Linear(4, 3))), []
    with watch(net, lambda name, out: seen.append((name, out.shape))): net(X)
    assert seen == [("0 Linear", (90, 4)), ("1 ReLU", (90, 4)), ("2 Linear", (90, 3))]
    assert not any("forward" in vars(m) for m in net.modules())
    plain = learner()
    plain.fit(2)
    learn = learner(stats := ActivationStats(every=4))
    learn.fit(2)
    for p, q in zip(learn.model.parameters(), plain.model.parameters()): assert torch.equal(p, q)  # looking changes nothing
    assert stats.steps == [0, 4, 8] and list(stats.stats) == ["0 Linear", "1 ReLU", "2 RandomMask", "3 Linear"]
    assert all(len(values) == 3 for found in stats.stats.values() for values in found.values())
    assert min(stats.stats["1 ReLU"]["zeros"]) > 0 and min(stats.stats["0 Linear"]["grad"]) > 0
    assert len(stats.plot(["mean", "std", "zeros", "grad"])) == 4


def guarded(model, x=X, y=Y, lr=0.1):
    before = [p.clone() for p in model.parameters()]
    learn = Learner(model, SGD(model.parameters(), lr=lr), DataLoader(x, y, 16), callbacks=[NaNGuard(), History(0)])
    with pytest.raises(FloatingPointError) as error: learn.fit(20)
    if learn.step == 0: assert all(torch.equal(p, q) or p.isnan().any() for p, q in zip(model.parameters(), before))
    return str(error.value)


def test_the_guard_says_where_it_began():
    def net(): return Model(Sequential(Linear(2, 5), ReLU(), Linear(5, 3)), CrossEntropyLoss())
    x = X.clone()
    x[20, 1] = math.nan
    assert "step 2: the loss is nan. It began in the batch x." == guarded(net(), x)
    broken = net()
    broken.net[0].weight[0, 0] = math.inf
    assert "It began in net.0.weight." in guarded(broken)
    large = net()
    large.net[2].weight.fill_(3e38)
    assert "It began in the output of layer 2 Linear." in guarded(large, 100 * X.flip(0), Y.flip(0))
    class Bad(ReLU):
        def bwd(self, out, input): add_grad(input, out.g * math.inf)
    assert "step 1: a gradient isn't finite. It began in net.0." in guarded(Model(Sequential(Linear(2, 5), Bad(), Linear(5, 3)), CrossEntropyLoss()))
    regression = Model(Sequential(Linear(2, 50), ReLU(), Linear(50, 1)), MSELoss())
    message = guarded(regression, X, X.sum(1, keepdim=True), lr=50.0)
    assert "The loss was growing" in message and "the lr is 50: try a tenth" in message


# ---- stopping and resuming

class At(Callback):
    "Does something at an event of a step, once."
    order = 99

    def __init__(self, event, step, act):
        self.step, self.act = step, act
        setattr(self, event, self._hear)

    def _hear(self, learn):
        if learn.step == self.step and self.act: self.act, act = None, self.act; act()


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    "As in a terminal: a shell starts what it runs in the background with Ctrl-C ignored."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c(): signal.raise_signal(signal.SIGINT)


EXTRA = {"Metrics": lambda: Metrics(accuracy=accuracy), "EarlyStopping": lambda: EarlyStopping(9), "Clip": lambda: ClipGradNorm(1.0),
         "Stats": lambda: ActivationStats(every=4)}


def extra(): return [make() for make in EXTRA.values()]


HAPPENS = {"before_epoch": (0, 6, 12), "after_epoch": (6, 12), "after_step": range(1, 18)}  # at which counts of steps


@pytest.mark.parametrize("event, step", [(e, s) for e in EVENTS[1:-1] for s in HAPPENS.get(e, range(18))])
def test_ctrl_c_anywhere_finishes_the_step_and_the_run_goes_on(event, step):
    whole = learner(*extra())
    whole.fit(3)
    learn = learner(*extra())
    learn.callbacks.append(At(event, step, press_ctrl_c))
    with pytest.raises(KeyboardInterrupt, match=r"after step \d+; fit\(\) continues from there"): learn.fit(3)
    assert learn.step == (step if event in ("after_step", "after_epoch") else step + 1)
    learn.fit()
    learn.callbacks.pop()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same(learn, whole)


def test_a_second_ctrl_c_does_not_wait():
    learn = learner(At("after_forward", 7, lambda: (press_ctrl_c(), press_ctrl_c())))
    with pytest.raises(KeyboardInterrupt): learn.fit(3)
    assert learn.step == 7 and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("optimizer", OPTIMISERS)
@pytest.mark.parametrize("step", [1, 5, 6, 7, 12, 17])
def test_saved_at_any_step_and_resumed_elsewhere(tmp_path, optimizer, step):
    class Save(Callback):
        order = 99
        def after_step(self, learn):
            if learn.step == step: learn.save(tmp_path / "run.pt")
    whole = learner(*extra(), optimizer=optimizer)
    whole.callbacks.append(Save())
    whole.fit(3)
    whole.callbacks.pop()
    resumed = learner(*extra(), optimizer=optimizer, seed=123)  # other weights, another order, another state of everything
    resumed.load(tmp_path / "run.pt")
    assert resumed.step == step
    resumed.fit()
    assert_same(resumed, whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_fifty_times_at_random_points_and_resumed_to_the_last_bit(tmp_path, monkeypatch):
    "SIGKILL at an event of a step, or inside a save: before the file is on the disk, before and after it gets its name."
    def die(*args): os.kill(os.getpid(), signal.SIGKILL)
    whole = learner(*extra())
    whole.fit(3)
    choice, killed = random.Random(0), 0
    for n in range(50):
        path = tmp_path / f"{n}.pt"
        point, step = choice.choice([*EVENTS[2:6], "write", "flush", "rename", "renamed"]), choice.randrange(2, 18)
        pid = os.fork()
        if not pid:
            try:
                learn, count = learner(*extra(), Checkpoint(path, every=1, unit="step")), [0]
                if point in EVENTS: learn.callbacks.append(At(point, step, die))
                else:
                    fsync, replace, write = os.fsync, os.replace, torch.save
                    def at_the_step(before, f, after=None):
                        def patched(*args):
                            if learn.step == step and before: before()
                            f(*args)
                            if learn.step == step and after: after()
                        return patched
                    if point == "write": torch.save = at_the_step(None, lambda state, file: (file.write(b"half"), die()) if learn.step == step else write(state, file))
                    if point == "flush": os.fsync = at_the_step(die, fsync)
                    if point == "rename": os.replace = at_the_step(die, replace)
                    if point == "renamed": os.replace = at_the_step(None, replace, die)
                learn.fit(3)
            finally: os._exit(1)
        killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        resumed = learner(*extra(), Checkpoint(path), seed=n + 1)
        resumed.load(path)
        assert step - 1 <= resumed.step <= step + 1
        resumed.fit()
        resumed.callbacks.pop()
        assert_same(resumed, whole)
        assert not path.with_name(path.name + ".part").exists()  # the next save has swept it up
    assert killed == 50


def test_resumed_in_another_process(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_training import *
learner(*extra(), Checkpoint({str(tmp_path / 'run.pt')!r}, every=4, unit="step"),
        At("after_step", 10, lambda: os.kill(os.getpid(), signal.SIGKILL))).fit(3)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    whole, resumed = learner(*extra()), learner(*extra(), seed=5)
    resumed.load(tmp_path / "run.pt")
    assert resumed.step == 8
    after = torch.get_rng_state()
    torch.manual_seed(0)
    whole = learner(*extra())
    whole.fit(3)
    torch.set_rng_state(after)
    resumed.fit()
    assert_same(resumed, whole)


def test_callbacks_may_come_and_go_on_resume():
    first = learner(*extra())
    first.fit(2)
    resumed = learner(ClipGradNorm(1.0), ProgressBar(), seed=3)
    resumed.load_state_dict(first.state_dict())
    clip = next(c for c in resumed.callbacks if isinstance(c, ClipGradNorm))
    assert len(clip.norms) == 12 and len(resumed.history.rows) == 2  # what was there is remembered
    resumed.fit(1)
    assert len(clip.norms) == 18 and resumed.epoch == 3
    assert len(resumed.history.epochs["accuracy"]) == 3 and math.isnan(resumed.history.epochs["accuracy"][-1])


def test_two_learners_share_no_memory():
    one, two = learner(), learner(seed=1)
    one.fit(1)
    two.load_state_dict(one.state_dict())
    before = [p.clone() for p in one.model.parameters()], [s["exp_avg"].clone() for s in one.optimizer.state.values()]
    two.fit(1)
    assert all(map(torch.equal, before[0], one.model.parameters()))
    assert all(map(torch.equal, before[1], [s["exp_avg"] for s in one.optimizer.state.values()]))


def test_an_error_saves_nothing_and_the_next_fit_is_right(tmp_path):
    def fail(): raise ZeroDivisionError
    learn = learner(Checkpoint(tmp_path / "x.pt", every=100), At("after_backward", 4, fail))
    with pytest.raises(ZeroDivisionError): learn.fit(3)
    assert not os.listdir(tmp_path) and learn.step == 4
    learn.fit()
    assert learn.step == 18 and (tmp_path / "x.pt").exists()


def test_fit_in_another_thread():
    learn = learner()
    thread = threading.Thread(target=learn.fit, args=(1,))
    thread.start(), thread.join()
    assert learn.step == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    learn = learner()
    learn.model.to("cuda")
    learn.fit(2)
    assert learn.device.type == "cuda" and learn.predict(X).device.type == "cuda"


# ---- files

def test_save_and_load(tmp_path):
    path, what = tmp_path / "x.pt", {"a": torch.arange(3), "b": [1, 2.5, "text", None, (True, float("inf"))]}
    save(path, what)
    found = load(path)
    assert torch.equal(found["a"], what["a"]) and found["b"] == what["b"] and os.listdir(tmp_path) == ["x.pt"]
    net, other = Linear(2, 3), Linear(2, 3)
    save(str(path), net)
    load(str(path), other)
    assert torch.equal(net.weight, other.weight)
    torch_net = nn.Linear(2, 3)
    torch_net.load_state_dict(torch.load(path))
    assert torch.equal(torch_net.weight, net.weight)
    learn = learner()
    learn.save(path)
    learn.model.load_state_dict(load(path)["model"])  # the weights alone


def test_an_error_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    save(path, {"n": 1})
    for name in ("fsync", "replace"):
        with monkeypatch.context() as m:
            def fail(*args): raise OSError("the disk is full")
            m.setattr(os, name, fail)
            with pytest.raises(OSError, match="the disk is full"): save(path, {"n": 2})
        assert load(path) == {"n": 1} and os.listdir(tmp_path) == ["x.pt"]
    with pytest.raises(Exception): save(path, {"f": lambda: 1})  # can't be saved
    assert load(path) == {"n": 1} and os.listdir(tmp_path) == ["x.pt"]


def test_bad_files_are_refused_and_change_nothing(tmp_path):
    class Gift:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "harm"),)

    learn, good, bad = learner(), tmp_path / "good.pt", tmp_path / "bad.pt"
    learn.fit(1)
    learn.save(good)
    whole = good.read_bytes()
    for content in (b"", b"text", whole[:-1], whole[:100], whole[len(whole) // 2:], pickle.dumps(Gift(), 2)):
        bad.write_bytes(content)
        other = learner(seed=1)
        before = [p.clone() for p in other.model.parameters()]
        with pytest.raises(ValueError, match="isn't a whole file of `save`'s"): other.load(bad)
        assert all(map(torch.equal, before, other.model.parameters()))
    torch.save(Gift(), bad)
    with pytest.raises(ValueError): load(bad)
    assert not (tmp_path / "harm").exists()
    with pytest.raises(FileNotFoundError): load(tmp_path / "none.pt")


def test_files_of_other_learners_are_refused_before_anything_is_written():
    learn = learner()
    learn.fit(1)
    state = learn.state_dict()
    for other in (learner(net=Sequential(Linear(2, 5), ReLU(), Linear(5, 3))), learner(optimizer="SGD"), learner(optimizer="AdamW"),
                  learner(net=Sequential(Linear(2, 16, bias=False), ReLU(), RandomMask(), Linear(16, 3)))):
        before = [p.clone() for p in other.model.parameters()]
        with pytest.raises(ValueError): other.load_state_dict(state)
        assert all(map(torch.equal, before, other.model.parameters())) and not other.optimizer.state and other.step == 0


def test_checkpoints_by_epoch_by_step_and_the_best(tmp_path):
    class Count(Checkpoint):
        saved = ()
        def after_step(self, learn): self.learn = learn; super().after_step(learn)
    for name, options, steps in [("epoch", dict(every=2), [12, 18, 18]), ("step", dict(every=5, unit="step"), [5, 10, 15, 18])]:
        seen, learn = [], learner(Checkpoint(tmp_path / name, **options))
        learn.save = lambda path: seen.append(learn.step)
        learn.fit(3)
        assert seen == (steps if name == "step" else [12, 18]), name
    class Values(Callback):
        def after_epoch(self, learn): learn.values["score"] = [1.0, 3.0, 2.0][learn.epoch - 1]
    learn = learner(Values(), Checkpoint(tmp_path / "best.pt", monitor="score", mode="max"))
    learn.fit(3)
    assert load(tmp_path / "best.pt")["progress"]["epoch"] == 2
    with pytest.raises(ValueError, match="unit is 'batch'"): Checkpoint("x", unit="batch")


# ---- pictures, and what is imported

def test_decision_boundary():
    learn = learner()
    learn.fit(1)
    for model in (learn, learn.model, learn.model.net, learn.predict):
        ax = plot_decision_boundary(model, X, Y, steps=20, title="t")
        ax.figure.canvas.draw()
        assert ax.get_title() == "t" and len(ax.collections) >= 4
    assert learn.model.training


def test_digits_and_spiral_are_learnt():
    d = digits()
    torch.manual_seed(0)
    model = Model(Sequential(Linear(64, 128), ReLU(), Linear(128, 10)), CrossEntropyLoss())
    learn = Learner(model, AdamW(model.parameters(), lr=1e-2), d[:2], d[2:], [Schedule(one_cycle), Metrics(accuracy=accuracy), History(0)])
    learn.fit(25)
    assert learn.history.epochs["accuracy"][-1] > 0.96


def test_importing_takes_neither_matplotlib_nor_tqdm_along():
    code = "import sys, torch; before = set(sys.modules); import fromfound.training; print([m for m in ('matplotlib', 'tqdm', 'fastcore') if m in set(sys.modules) - before])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
