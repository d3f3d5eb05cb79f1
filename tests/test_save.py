"""Files that are written whole or not at all, and read only if everything in them fits."""
import json
import math
import os
import pickle
import random
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fromfound.layers import CrossEntropyLoss, Linear, Model, ReLU, Sequential
from fromfound.optim import SGD, Adam, CosineAnnealingLR, StepLR
from fromfound.training import Checkpoint, DataLoader, EarlyStopping, Learner, Metrics, Schedule, load, save

torch.set_num_threads(1)
X, Y = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3


def learner(seed=0, hidden=5, out=3, opt=Adam, callbacks=(), **options):
    torch.manual_seed(seed)
    model = Model(Sequential(Linear(2, hidden), ReLU(), Linear(hidden, out)), CrossEntropyLoss())
    opt = opt(model.parameters(), lr=1e-2, **options)
    schedule = Schedule(CosineAnnealingLR(opt, 30))
    return Learner(model, opt, DataLoader(X, Y, 16, shuffle=True), (X, Y), [Metrics(), schedule, EarlyStopping(), *callbacks])


def picture(learn: Learner):
    "Everything that could be changed, as bytes and texts."
    return {name: repr([(t.shape, t.dtype, hash(t.numpy().tobytes())) if isinstance(t, torch.Tensor) else t
                        for t in _leaves(part.state_dict())]) for name, part in learn.parts().items()}


def _leaves(value):
    if isinstance(value, dict): return [z for k, v in value.items() for z in (k, *_leaves(v))]
    if isinstance(value, (list, tuple)): return [z for v in value for z in _leaves(v)]
    return [value]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good") / "run.safetensors"
    learn = learner()
    learn.fit(3)
    learn.save(path)
    return path


def refused(path, learn=None, match=None, error=ValueError):
    "load raises, and changes nothing."
    learn = learn or learner(seed=1)
    before = picture(learn)
    with pytest.raises(error, match=match) as caught: learn.load(path)
    assert type(caught.value) is error, caught.value
    assert picture(learn) == before
    return str(caught.value)


# --- what can be saved

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda v: st.lists(v, max_size=3) | st.lists(v, max_size=3).map(tuple) | st.dictionaries(st.text(max_size=3) | st.integers(), v, max_size=3),
    max_leaves=8)


@given(value=values)
@settings(max_examples=60, deadline=None)
def test_plain_things_come_back_as_they_were(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "plain.safetensors"
    save(path, value=value)
    assert repr(load(path)["value"]) == repr(value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (4,)])
def test_tensors_come_back_as_they_were(tmp_path, dtype, shape):
    t = (torch.randn(shape) * 3).to(dtype)
    save(tmp_path / "t", t=t, strided=torch.stack([t, t], -1)[..., 0], nested=[{"x": (t, 1.5)}])
    back = load(tmp_path / "t")
    for u in (back["t"], back["strided"], back["nested"][0]["x"][0]): assert torch.equal(u, t) and u.dtype == dtype


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    save(path, a=1)
    old = path.read_bytes()
    for wrong in (object(), {1.5: 2}, {(1, 2): 3}, lambda: 0, {"a": {True: [set()]}}):
        with pytest.raises(TypeError, match="save"): save(path, a=wrong)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["x"]


def test_others_can_read_it_and_the_weights_go_to_torch(good):
    tensors = load_file(good)
    theirs = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    theirs.load_state_dict({k.removeprefix("model.net."): t for k, t in tensors.items() if k.startswith("model.")})
    learn = learner(seed=3)
    learn.load(good)
    assert torch.equal(theirs(X).argmax(1), learn.predict(X).argmax(1))


def test_the_weights_alone(good):
    learn = learner(seed=4)
    random_state = torch.get_rng_state()
    rest = load(good, learn.model)
    assert "opt" in rest and "callback History" in rest and rest["progress"] == {"step": 9, "epoch": 3, "batch": 0, "epochs": 3}
    assert torch.equal(random_state, torch.get_rng_state()), "torch's generator is left alone unless it is asked for"
    whole = learner(seed=5)
    whole.load(good)
    assert torch.equal(whole.predict(X), learn.predict(X))


def test_parts_by_name_for_a_loop_of_ones_own(tmp_path):
    model = Model(Sequential(Linear(2, 3)), CrossEntropyLoss())
    opt, generator = SGD(model.parameters(), lr=0.1, momentum=0.9), torch.Generator().manual_seed(3)
    model(X, Y), model.backward(), opt.step()
    save(tmp_path / "x", model, opt=opt, generator=generator, rng=torch.default_generator, epoch=3, losses=[1.0, math.nan])
    a, b = torch.rand(3, generator=generator), torch.rand(3)
    other = Model(Sequential(Linear(2, 3)), CrossEntropyLoss())
    other_opt = SGD(other.parameters(), lr=0.5, momentum=0.5)
    rest = load(tmp_path / "x", other, opt=other_opt, generator=generator, rng=torch.default_generator)
    assert rest["epoch"] == 3 and math.isnan(rest["losses"][1]) and other_opt.param_groups[0]["lr"] == 0.1
    assert torch.equal(a, torch.rand(3, generator=generator)) and torch.equal(b, torch.rand(3))
    with pytest.raises(TypeError, match="epoch, a int|epoch"): load(tmp_path / "x", other, epoch=3)
    with pytest.raises(ValueError, match="no 'schedule' in the file"): load(tmp_path / "x", other, schedule=StepLR(other_opt, 1))


# --- whole or not at all

def test_nothing_else_is_left_and_permissions_are_the_usual_ones(tmp_path):
    umask = os.umask(0o022)
    try: save(tmp_path / "x", a=1)
    finally: os.umask(umask)
    assert os.listdir(tmp_path) == ["x"] and stat.S_IMODE(os.stat(tmp_path / "x").st_mode) == 0o644


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    os.symlink(tmp_path / "there" / "x", tmp_path / "x")
    save(tmp_path / "x", a=1)
    assert (tmp_path / "x").is_symlink() and load(tmp_path / "there" / "x") == {"a": 1}


def test_an_error_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    save(tmp_path / "x", a=1)
    for name, error in (("fsync", OSError(28, "No space left on device")), ("replace", KeyboardInterrupt())):
        with monkeypatch.context() as m:
            def fail(*args, error=error): raise error
            m.setattr(os, name, fail)
            with pytest.raises(type(error)): save(tmp_path / "x", a=2)
        assert load(tmp_path / "x") == {"a": 1} and os.listdir(tmp_path) == ["x"]
    with pytest.raises(FileNotFoundError): save(tmp_path / "nowhere" / "x", a=1)
    with pytest.raises(OSError): save(tmp_path, a=1)
    assert os.listdir(tmp_path) == ["x"]


def test_killed_at_50_random_moments(tmp_path):
    "SIGKILL in the middle of saving: what is there always loads, and is one of the versions, whole; no litter piles up."
    path, rng, done, last = tmp_path / "x", random.Random(0), 0, 0
    save(path, a=torch.zeros(60_000), n=0, b=torch.zeros(300, 200))
    forker = subprocess.Popen([sys.executable, "-c", FORKER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    litter = 0
    try:
        for _ in range(50):
            forker.stdin.write(f"{last}\n")
            forker.stdin.flush()
            pid = int(forker.stdout.readline())
            time.sleep(rng.uniform(0.002, 0.03))
            os.kill(pid, signal.SIGKILL)
            assert forker.stdout.readline().strip() == str(-signal.SIGKILL)
            litter += len(os.listdir(tmp_path)) - 1
            assert len(os.listdir(tmp_path)) <= 2, "what one dead save left, the next removes"
            got = load(path)
            n = got["n"]
            assert n >= last and torch.equal(got["a"], torch.full((60_000,), float(n))) and torch.equal(got["b"], torch.full((300, 200), -float(n)))
            last = n
    finally:
        forker.stdin.close()
        forker.wait()
    assert last >= 20, "most of them were killed while saving, not before"
    assert litter, "some of them in the middle of a write"
    save(path, a=1)
    assert os.listdir(tmp_path) == ["x"]


# Starting Python and torch takes a second: one process does it once, and forks a saver each time it is told to.
FORKER = """
import os, sys, torch
from fromfound.training import save
torch.set_num_threads(1)
save(sys.argv[1] + "2", a=1)
os.unlink(sys.argv[1] + "2")
for line in sys.stdin:
    n = int(line)
    pid = os.fork()
    if pid == 0:
        while True:
            n += 1
            save(sys.argv[1], a=torch.full((60_000,), float(n)), n=n, b=torch.full((300, 200), -float(n)))
    print(pid, flush=True)
    print(-os.WTERMSIG(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_living_saves_are_not_swept(tmp_path):
    "Several processes that save to one path do not remove each other's files."
    code = f"""
import os
from fromfound.training import save
children = [os.fork() for _ in range(2)]
for n in range(20): save({str(tmp_path / 'x')!r}, n=n)
if children[-1]: os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)
    assert load(tmp_path / "x") == {"n": 19} and os.listdir(tmp_path) == ["x"]


def test_only_its_own_litter_is_removed(tmp_path):
    mine = tmp_path / ".x.0123456789abcdef.saving"
    others = [tmp_path / name for name in (".y.0123456789abcdef.saving", ".x.saving", ".x.0123456789abcdef.saving.bak", "x.saving")]
    for path in (mine, *others): path.write_text("")
    save(tmp_path / "x", a=1)
    assert not mine.exists() and all(path.exists() for path in others)


# --- what is refused

def header_of(data: bytes):
    n = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + n]), data[8 + n:]


def with_header(header, body: bytes) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + body


def test_missing_files_and_folders(tmp_path):
    refused(tmp_path / "nowhere", error=FileNotFoundError)
    refused(tmp_path, error=IsADirectoryError)
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", match="no ordinary file")


@pytest.mark.parametrize("data, match", [
    (b"", "cut off"), (b"\x00" * 7, "cut off"), (b"\xff" * 8, "cut off"), (struct.pack("<Q", 2**40) + b"{}", "cut off"),
    (struct.pack("<Q", 90_000_000) + b"{}", "cut off"), (with_header({}, b""), "not written by fromfound"),
    (with_header(b"[" * 100_000, b""), "damaged"), (with_header(b"{nonsense}", b""), "damaged"), (with_header(b"\xff\xfe", b""), "damaged"),
    (with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 4), "damaged"),
    (with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"\0" * 8), "damaged"),
    (with_header({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}, b"\0" * 8), "damaged"),
    (with_header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}, b"\0" * 8), "damaged"),
    (with_header({"a": {"dtype": "Q7", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8), "damaged"),
    (with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4), "damaged"),
    (with_header({"__metadata__": {"fromfound": 3}}, b""), "damaged"), (with_header({"__metadata__": {"fromfound": "{}"}}, b""), "damaged"),
    (with_header({"__metadata__": {"fromfound": "[" * 100_000}}, b""), "damaged"), (with_header({"__metadata__": {"fromfound": "7"}}, b""), "damaged"),
    (with_header({"__metadata__": {"fromfound": "1" * 5000}}, b""), "damaged"),
    (b"PK\x03\x04" + b"\0" * 100, "pickle"),
])
def test_hostile_files(tmp_path, data, match):
    (tmp_path / "x").write_bytes(data)
    refused(tmp_path / "x", match=match)


def test_pickles_are_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "exploded"),)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "x").write_bytes(pickle.dumps(Bomb(), protocol))
        assert protocol < 2 or "pickle" in refused(tmp_path / "x")
    torch.save(Bomb(), tmp_path / "x")
    refused(tmp_path / "x", match="pickle")
    assert not (tmp_path / "exploded").exists()


def forged(good: Path, change) -> bytes:
    "A file whose sum is right, but whose content is not what save would have written."
    from fromfound.training import _digest, _read_tensors
    header, tensors = _read_tensors(good)
    head = json.loads(header)
    parts = json.loads(head["parts"])
    changed = change(head, parts, tensors)
    head["parts"] = changed if isinstance(changed, str) and changed.startswith("{") else json.dumps(parts)
    head["sha256"] = _digest(head["parts"], tensors)
    from safetensors.torch import save as to_bytes
    return to_bytes(tensors, {"fromfound": json.dumps(head)})


def set_at(parts, part, key, value):
    entry = next(e for e in parts[part]["dict"] if e[0] == key)
    entry[1] = value


FORGERIES = {
    "version": lambda h, p, t: h.update(version=2), "no version": lambda h, p, t: h.pop("version"),
    "no model": lambda h, p, t: (p.pop("model"), [t.pop(k) for k in list(t) if k.startswith("model.")]),
    "weight of another shape": lambda h, p, t: t.update({"model.net.0.weight": torch.zeros(5, 3)}),
    "weight of another dtype": lambda h, p, t: t.update({"model.net.0.weight": torch.zeros(5, 2, dtype=torch.float64)}),
    "tensor too many": lambda h, p, t: t.update(extra=torch.zeros(1)),
    "tensor too few": lambda h, p, t: t.pop("model.net.0.weight"),
    "tensor twice": lambda h, p, t: set_at(p, "model", "net.0.weight", {"tensor": "model.net.2.weight"}),
    "key NaN": lambda h, p, t: p["model"]["dict"].append([math.nan, 1]),
    "key None": lambda h, p, t: p["progress"]["dict"].append([None, 1]),
    "name unknown": lambda h, p, t: p["model"]["dict"].append(["net.9.weight", 1]),
    "a number for a weight": lambda h, p, t: (t.pop("model.net.0.weight"), set_at(p, "model", "net.0.weight", 3)),
    "unknown kind": lambda h, p, t: p.update(model={"module": "os.system"}),
    "two kinds": lambda h, p, t: p["model"].update(list=[]),
    "parts a list": lambda h, p, t: p.clear(),
    "deep": lambda h, p, t: '{"x": ' + '{"list": [' * 50_000 + "1" + "]}" * 50_000 + "}",
    "deep, but not for json": lambda h, p, t: '{"x": ' + '{"list": [' * 600 + "1" + "]}" * 600 + "}",
    "step negative": lambda h, p, t: set_at(p, "progress", "step", -1), "step a text": lambda h, p, t: set_at(p, "progress", "step", "9"),
    "batch too high": lambda h, p, t: set_at(p, "progress", "batch", 99), "epoch a float": lambda h, p, t: set_at(p, "progress", "epoch", 1.5),
    "loader of other data": lambda h, p, t: set_at(p, "loader", "n", 41), "loader seed": lambda h, p, t: set_at(p, "loader", "seed", -5),
    "loader batch": lambda h, p, t: set_at(p, "loader", "batch", 10**9),
    "generator": lambda h, p, t: t.update({"loader.generator": torch.zeros(5056, dtype=torch.uint8)}),
    "rng": lambda h, p, t: t.update({"rng.cpu": torch.zeros(5056, dtype=torch.uint8)}),
    "rng short": lambda h, p, t: t.update({"rng.cpu": torch.zeros(3, dtype=torch.uint8)}),
    "schedule text": lambda h, p, t: set_at(p, "callback Schedule", "T_max", "30"),
    "schedule step": lambda h, p, t: set_at(p, "callback Schedule", "last_epoch", -7),
    "schedule lrs": lambda h, p, t: set_at(p, "callback Schedule", "base_lrs", {"list": [1.0, 2.0]}),
    "opt state shape": lambda h, p, t: t.update({"opt.state.0.exp_avg": torch.zeros(7)}),
    "opt groups": lambda h, p, t: set_at(p, "opt", "param_groups", {"list": []}),
    "opt state": lambda h, p, t: (set_at(p, "opt", "state", None), [t.pop(k) for k in list(t) if k.startswith("opt.")]),
    "opt a text": lambda h, p, t: (p.update(opt="adam"), [t.pop(k) for k in list(t) if k.startswith("opt.")]),
    "history short": lambda h, p, t: t.update({"callback History.steps.loss": torch.zeros(2, dtype=torch.float64)}),
    "history 2d": lambda h, p, t: t.update({"callback History.steps.loss": torch.zeros(9, 9, dtype=torch.float64)}),
    "early stopping": lambda h, p, t: set_at(p, "callback EarlyStopping", "waited", "no"),
    "early stopping weights": lambda h, p, t: t.update({"callback EarlyStopping.weights.net.0.weight": torch.zeros(9, 9)}),
    "another callback": lambda h, p, t: p.update({"callback Mixup": {"dict": [["alpha", 0.4]]}}),
    "no schedule": lambda h, p, t: p.pop("callback Schedule"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_files(tmp_path, good, name):
    (tmp_path / "x").write_bytes(forged(good, FORGERIES[name]))
    refused(tmp_path / "x")


def test_the_forger_can_also_write_a_right_one(tmp_path, good):
    (tmp_path / "x").write_bytes(forged(good, lambda h, p, t: None))
    learner(seed=1).load(tmp_path / "x")


def test_files_of_learners_that_are_built_otherwise(good):
    for other in (learner(1, hidden=6), learner(1, out=4), learner(1, opt=SGD, momentum=0.9), learner(1, amsgrad=True)):
        if other.opt.param_groups[0].get("amsgrad"): continue  # torch takes over the options that were saved, and so does load
        refused(good, other)
    torch.manual_seed(1)
    model = Model(Sequential(Linear(2, 5), ReLU(), Linear(5, 3)), CrossEntropyLoss())
    bare = Learner(model, Adam(model.parameters()), DataLoader(X, Y, 16, shuffle=True))
    refused(good, bare, match="Schedule")
    float64 = learner(1)
    float64.model.to(torch.float64)
    refused(good, float64, match="float32 in the file, but .* torch.float64 here")


def test_a_plain_safetensors_file_is_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "x")
    refused(tmp_path / "x", match="not written by fromfound")


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_mutated_files(tmp_path_factory, good, data):
    "Whatever is done to a good file: it is refused with a ValueError, or still says the same."
    raw = good.read_bytes()
    head = struct.unpack("<Q", raw[:8])[0] + 8
    kind = data.draw(st.sampled_from(["cut", "flip", "flip head", "insert", "delete", "swap"]))
    at = data.draw(st.integers(0, (head if kind == "flip head" else len(raw)) - 1))
    size = data.draw(st.integers(1, 16))
    if kind == "cut": mutated = raw[:at]
    elif kind.startswith("flip"): mutated = raw[:at] + bytes([raw[at] ^ data.draw(st.integers(1, 255))]) + raw[at + 1:]
    elif kind == "insert": mutated = raw[:at] + data.draw(st.binary(min_size=size, max_size=size)) + raw[at:]
    elif kind == "delete": mutated = raw[:at] + raw[at + size:]
    else: mutated = raw[:at] + raw[at:at + size][::-1] + raw[at + size:]
    path = tmp_path_factory.getbasetemp() / "mutated"
    path.write_bytes(mutated)
    learn = learner(seed=1)
    before = picture(learn)
    try: learn.load(path)
    except ValueError: assert picture(learn) == before
    else:
        now = picture(learn)
        learn.load(good)
        assert picture(learn) == now


def test_cut_off_everywhere(tmp_path, good):
    raw = good.read_bytes()
    learn = learner(seed=1)
    for n in [*range(0, 40), *range(40, len(raw), 997), len(raw) - 1]:
        (tmp_path / "x").write_bytes(raw[:n])
        with pytest.raises(ValueError, match="cut off|damaged"): learn.load(tmp_path / "x")


# --- checkpoints

def test_checkpoints_by_epoch_by_step_and_at_the_end(tmp_path):
    learn = learner(callbacks=[Checkpoint(tmp_path / "new" / "a", every=2), Checkpoint(tmp_path / "b", every=2, unit="step")])
    learn.fit(3)
    for name in ("new/a", "b"): assert load(tmp_path / name)["progress"]["step"] == 9


def test_the_best_is_kept(tmp_path):
    values = iter([3.0, 1.0, 2.0])
    learn = learner(callbacks=[Metrics(mine=lambda out, y: next(values)), Checkpoint(tmp_path / "a", monitor="mine")])
    learn.fit(3)
    assert load(tmp_path / "a")["progress"]["epoch"] == 2
    other = learner(seed=1, callbacks=[Metrics(mine=lambda out, y: 1.5), Checkpoint(tmp_path / "a", monitor="mine")])
    other.load(tmp_path / "a")
    other.fit(1)
    assert load(tmp_path / "a")["progress"]["epoch"] == 2, "1.5 is no better than the 1.0 that was loaded"
    for wrong in (dict(every=0), dict(unit="day"), dict(monitor="loss", unit="step"), dict(mode="up")):
        with pytest.raises(ValueError): Checkpoint(tmp_path / "a", **wrong)
