"""fromfound.data: the digits, the spiral, IDX files of every kind, and downloads from servers of every kind."""
import gzip
import hashlib
import os
import socket
import struct
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.testing import assert_close

from fromfound import data
from fromfound.data import DownloadError, Split, digits, fetch, mnist, read_idx, spiral

CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}


def idx(array, sizes=None):
    "The bytes of an IDX file that holds an array; with `sizes`, its header says these instead of the shape."
    sizes = array.shape if sizes is None else sizes
    header = bytes([0, 0, CODES[array.dtype.str[1:]], len(sizes)]) + b"".join(struct.pack(">I", s) for s in sizes)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


IMAGES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)


# --- digits ---------------------------------------------------------------------------------------------------

def test_digits_facts():
    s = digits()
    assert isinstance(s, Split) and s._fields == ("x_train", "y_train", "x_valid", "y_valid")
    assert [tuple(t.shape) for t in s] == [(1442, 64), (1442,), (355, 64), (355,)]
    assert [t.dtype for t in s] == [torch.float32, torch.int64] * 2
    x, y = torch.cat([s.x_train, s.x_valid]), torch.cat([s.y_train, s.y_valid])
    assert x.min() == 0 and x.max() == 1 and torch.equal(x * 16, (x * 16).round())
    assert y.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert not any(t.requires_grad for t in s)


def test_digits_split_is_disjoint_and_complete():
    s = digits()
    table = torch.tensor(data._digits_table())
    x, y = torch.empty(1797, 64), torch.empty(1797, dtype=torch.int64)
    valid = sorted(i for d in range(10) for i in (table[:, 64] == d).nonzero().flatten().tolist()[4::5])
    train = sorted(set(range(1797)) - set(valid))
    x[valid], y[valid], x[train], y[train] = s.x_valid, s.y_valid, s.x_train, s.y_train
    assert torch.equal(x * 16, table[:, :64].float()) and torch.equal(y, table[:, 64].long())


def test_digits_with_channels_are_the_same():
    for a, b in zip(digits(), digits(flat=False)):
        assert_close(a.reshape(b.shape), b)
    assert digits(flat=False).x_train.shape == (1442, 1, 8, 8)


def test_digits_are_equal_at_each_call_and_not_shared():
    a, b = digits(), digits()
    for t in a: t.zero_()
    assert all((t != 0).any() for t in b)
    for t, u in zip(b, digits()): assert torch.equal(t, u)


def test_digits_do_not_depend_on_the_default_dtype():
    old = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert digits().x_train.dtype == spiral()[0].dtype == torch.float32
    finally: torch.set_default_dtype(old)


def test_digits_are_those_of_scikit_learn():
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    assert np.array_equal(theirs.data, data._digits_table()[:, :64])
    assert np.array_equal(theirs.target, data._digits_table()[:, 64])


def test_licence_is_beside_the_file():
    text = (data.resources.files("fromfound") / "digits.LICENSE").read_text(encoding="utf-8")
    for word in ("Alpaydin", "Kaynak", "CC BY 4.0", "https://doi.org/10.24432/C50P49", "What was changed"):
        assert word in text
    assert "CC BY 4.0" in digits.__doc__ and "Alpaydin" in digits.__doc__


def test_nothing_but_mnist_needs_a_network(monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError("somebody asked for the network")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    data._digits_table.cache_clear()
    digits(), spiral(), read_idx(idx(IMAGES))


# --- spiral ---------------------------------------------------------------------------------------------------

@given(n=st.integers(1, 30), k=st.integers(1, 6), noise=st.floats(0, 2), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_spiral_facts(n, k, noise, seed):
    x, y = spiral(n, k, noise, generator=torch.Generator().manual_seed(seed))
    again, _ = spiral(n, k, noise, generator=torch.Generator().manual_seed(seed))
    assert x.shape == (n * k, 2) and x.dtype == torch.float32 and torch.equal(x, again)
    assert y.dtype == torch.int64 and torch.equal(y, torch.arange(k).repeat_interleave(n))
    radius = torch.linspace(0, 1, n).repeat(k)
    assert_close(x.norm(dim=1), radius, atol=1e-5, rtol=1e-5)  # the noise turns points, it never moves them out


def test_spiral_without_noise_is_the_formula():
    x, _ = spiral(50, 3, noise=0)
    r = torch.linspace(0, 1, 50, dtype=torch.float64)
    for k in range(3):
        angle = 2 * torch.pi * k / 3 + 4 * r
        expected = torch.stack([r * angle.sin(), r * angle.cos()], 1).float()
        assert_close(x[50 * k : 50 * k + 50], expected, atol=1e-6, rtol=1e-5)


def test_spiral_draws_from_torch_or_from_the_generator():
    torch.manual_seed(3)
    a, _ = spiral()
    torch.manual_seed(3)
    b, _ = spiral()
    state = torch.get_rng_state()
    c, _ = spiral(generator=torch.Generator().manual_seed(3))
    assert torch.equal(a, b) and torch.equal(a, c) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bad", [
    dict(n_per_class=0), dict(n_per_class=-1), dict(n_per_class=2.5), dict(n_per_class=True), dict(n_classes=0),
    dict(n_classes="3"), dict(noise=-0.1), dict(noise=float("nan")), dict(noise=float("inf")),
])
def test_spiral_refuses(bad):
    with pytest.raises(ValueError, match=f"spiral: {next(iter(bad))}"): spiral(**bad)


# --- IDX ------------------------------------------------------------------------------------------------------

arrays = st.sampled_from(sorted(CODES)).flatmap(
    lambda t: hnp.arrays(np.dtype(t), hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)))


@given(array=arrays, packed=st.booleans())
@settings(max_examples=80, deadline=None)
def test_idx_round_trip(array, packed):
    raw = idx(array)
    got = read_idx(gzip.compress(raw) if packed else raw)
    assert got.numpy().dtype == array.dtype and got.shape == array.shape
    np.testing.assert_array_equal(got.numpy(), array)


@given(junk=st.binary(max_size=60), packed=st.booleans())
@settings(max_examples=150, deadline=None)
def test_idx_junk_is_a_tensor_or_a_value_error(junk, packed):
    for raw in (junk, b"\0\0" + junk, b"\0\0\x08\x01" + junk):
        try: got = read_idx(gzip.compress(raw) if packed else raw)
        except ValueError as error: assert str(error).startswith("read_idx: ")
        else: assert isinstance(got, torch.Tensor)


@given(cut=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_idx_cut_off_anywhere(cut):
    for raw in (idx(IMAGES), gzip.compress(idx(IMAGES))):
        with pytest.raises(ValueError, match="cut off|damaged|not an IDX file"): read_idx(raw[: cut % len(raw)])


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(max_examples=100, deadline=None)
def test_idx_with_a_flipped_bit_is_never_another_array(at, bit):
    raw = bytearray(gzip.compress(idx(IMAGES), mtime=0))
    raw[at % len(raw)] ^= 1 << bit
    try: got = read_idx(bytes(raw))
    except ValueError: return
    np.testing.assert_array_equal(got.numpy(), IMAGES)  # the bit was in a part of gzip's header that says nothing


def test_idx_from_a_path(tmp_path):
    for name, raw in (("plain", idx(IMAGES)), ("packed.gz", gzip.compress(idx(IMAGES)))):
        (tmp_path / name).write_bytes(raw)
        for path in (tmp_path / name, str(tmp_path / name)):
            np.testing.assert_array_equal(read_idx(path).numpy(), IMAGES)
    for raw in (bytearray(idx(IMAGES)), memoryview(idx(IMAGES))):
        np.testing.assert_array_equal(read_idx(raw).numpy(), IMAGES)
    with pytest.raises(FileNotFoundError): read_idx(tmp_path / "none")


def test_idx_result_is_its_own():
    raw = bytearray(idx(IMAGES))
    got = read_idx(raw)
    got += 1
    assert raw == idx(IMAGES)


HOSTILE = {
    "nothing": (b"", "cut off"),
    "magic": (b"\0\1\x08\x01" + bytes(5), "not an IDX file"),
    "web page": (b"<html>not found</html>", "not an IDX file"),
    "type": (b"\0\0\x0a\x01\0\0\0\1\0", "type 10"),
    "dimensions": (b"\0\0\x08\xff" + bytes(4 * 255), "255 dimensions"),
    "few sizes": (b"\0\0\x08\x03\0\0\0\1", "list of dimensions"),
    "too short": (idx(IMAGES, (3, 4, 6)), "cut off"),
    "too long": (idx(IMAGES, (3, 4, 4)), "more in it"),
    "trailing": (idx(IMAGES) + b"\0", "more in it"),
    "huge": (b"\0\0\x08\x03" + b"\xff" * 12, "the header speaks of"),
    "overflow": (b"\0\0\x0e\x04" + b"\x80\0\0\0" * 4, "the header speaks of"),  # 2**124 x 8 is 0 modulo 2**64
    "zero and huge": (b"\0\0\x08\x03" + bytes(4) + b"\xff" * 8, "the header speaks of"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("packed", [False, True])
def test_idx_hostile(name, packed):
    raw, text = HOSTILE[name]
    with pytest.raises(ValueError, match=text): read_idx(gzip.compress(raw) if packed else raw)


@pytest.mark.parametrize("tail", [b"\x1f", b"no gzip", gzip.compress(b"a second member")])
def test_idx_with_something_behind_the_gzip_stream(tail):
    with pytest.raises(ValueError): read_idx(gzip.compress(idx(IMAGES)) + tail)


def peak(f):
    "The most memory, in bytes, that Python held for f on its way."
    tracemalloc.start()
    try: f()
    finally: most = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    return most


def test_idx_bombs_take_no_memory():
    zeros = gzip.compress(bytes(50_000_000))
    bombs = [
        gzip.compress(idx(IMAGES) + bytes(50_000_000)),  # more than it says
        gzip.compress(b"\0\0\x08\x01\x0f\xff\xff\xff" + bytes(1000)),  # says 256 MiB, holds 1000 bytes
        gzip.compress(b"\0\0\x08\x01\x7f\xff\xff\xff") + zeros,  # says 2 GiB and would send them
        b"\0\0\x08\x01\x0f\xff\xff\xff" + bytes(1000),
    ]
    for bomb in bombs:
        def refuse():
            with pytest.raises(ValueError): read_idx(bomb)
        assert peak(refuse) < 2_000_000


def test_idx_limit_can_be_moved():
    with pytest.raises(ValueError, match="more than 59 bytes"): read_idx(idx(IMAGES), max_bytes=59)
    assert read_idx(idx(IMAGES), max_bytes=60).shape == (3, 4, 5)


@pytest.mark.parametrize("source", [None, 5, ["a"], torch.zeros(3)])
def test_idx_wants_a_path_or_bytes(source):
    with pytest.raises(TypeError, match="read_idx: expected a path or bytes"): read_idx(source)


# --- downloads ------------------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 800  # more than one chunk
NAME, SIZE, SHA = "some.bin", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    "Each folder of this server fails in a way of its own."
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def send(self, body, length=None):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.asked.append(self.path)
        folder, name = self.path.strip("/").split("/")
        body = self.server.files.get(name, b"")
        self.close_connection = True
        try: getattr(self, folder)(body)
        except (BrokenPipeError, ConnectionResetError): pass  # the client has had enough

    def good(self, body): self.send(body)
    def truncated(self, body): self.send(body[:-100])
    def interrupted(self, body): self.send(body[: len(body) // 2], len(body))  # promises all, then hangs up
    def corrupted(self, body): self.send(body[:50] + bytes([body[50] ^ 1]) + body[51:])
    def another(self, body): self.send(bytes(len(body)))
    def longer(self, body): self.send(body + b"!")
    def missing(self, body): self.send_error(404)
    def broken(self, body): self.send_error(500)

    def nonsense(self, body): self.wfile.write(b"what do you want?\r\n\r\n")

    def endless(self, body):
        self.send_response(200)
        self.end_headers()
        for _ in range(100_000):  # would be 6.5 GB
            self.wfile.write(bytes(1 << 16))
            self.server.sent += 1 << 16

    def silent(self, body):
        self.send(body[:1000], len(body))
        self.wfile.flush()
        self.server.release.wait(20)

    def slow(self, body):
        self.send(b"", len(body))
        for k in range(200):
            self.wfile.write(body[k : k + 1])
            if self.server.release.wait(0.05): return

    def chunked(self, body):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for k in range(0, len(body), 70_000):
            part = body[k : k + 70_000]
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def moved(self, body):
        self.send_response(302)
        self.send_header("Location", self.path.replace("moved", "good"))
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as s:
        s.daemon_threads = True
        s.files, s.asked, s.sent, s.release = {NAME: CONTENT}, [], 0, threading.Event()
        s.url = lambda folder: f"http://127.0.0.1:{s.server_port}/{folder}/"
        thread = threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield s
        s.release.set()
        s.shutdown()
        thread.join()


def get(server, cache, *folders, **kwargs):
    return fetch(NAME, SIZE, SHA, [server.url(f) for f in folders], cache, **kwargs)


@pytest.mark.parametrize("folder", ["good", "chunked", "moved"])
def test_fetch_good(server, tmp_path, folder):
    cache = tmp_path / "new" / "folder"
    assert get(server, cache, folder) == CONTENT
    assert os.listdir(cache) == [NAME] and (cache / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("folder, text", [
    ("truncated", "cut off"), ("interrupted", "cut off|IncompleteRead"), ("corrupted", "wrong SHA-256 sum"),
    ("another", "wrong SHA-256 sum"), ("longer", "more than the"), ("endless", "more than the"), ("missing", "404"),
    ("broken", "500"), ("nonsense", "what do you want|BadStatusLine|HTTP/0.9"),
])
def test_fetch_bad_server_leaves_nothing(server, tmp_path, folder, text):
    with pytest.raises(DownloadError, match=text) as error: get(server, tmp_path, folder)
    assert os.listdir(tmp_path) == []
    assert server.url(folder) + NAME in str(error.value) and "digits()" in str(error.value)
    assert isinstance(error.value, OSError)
    assert server.sent < 100 * SIZE  # the rest of what the endless one sent is still in the buffers of the system


def test_fetch_gives_up_on_a_silent_server(server, tmp_path):
    start = time.monotonic()
    with pytest.raises(DownloadError, match="timed out"): get(server, tmp_path, "silent", timeout=0.2)
    assert time.monotonic() - start < 10 and os.listdir(tmp_path) == []


def test_fetch_gives_up_on_a_slow_server(server, tmp_path):
    with pytest.raises(DownloadError, match="too slow"): get(server, tmp_path, "slow", max_seconds=0.2)
    assert os.listdir(tmp_path) == []


def test_fetch_asks_the_next_mirror(server, tmp_path):
    assert get(server, tmp_path, "missing", "corrupted", "interrupted", "good", "endless") == CONTENT
    assert [path.split("/")[1] for path in server.asked] == ["missing", "corrupted", "interrupted", "good"]
    assert os.listdir(tmp_path) == [NAME]


def test_fetch_names_all_that_it_tried(server, tmp_path):
    with pytest.raises(DownloadError) as error: get(server, tmp_path, "missing", "another")
    for part in ("missing", "404", "another", "SHA-256"): assert part in str(error.value)


def test_fetch_uses_the_cache_without_a_network(server, tmp_path, monkeypatch):
    get(server, tmp_path, "good")
    def refuse(*args, **kwargs): raise AssertionError("somebody asked for the network")
    monkeypatch.setattr(socket, "socket", refuse)
    assert get(server, tmp_path, "good") == CONTENT and get(server, tmp_path) == CONTENT
    assert len(server.asked) == 1


@pytest.mark.parametrize("spoilt", [b"", CONTENT[:-1], CONTENT + b"!", bytes(SIZE)])
def test_fetch_replaces_a_spoilt_file(server, tmp_path, spoilt):
    (tmp_path / NAME).write_bytes(spoilt)
    with pytest.raises(DownloadError): get(server, tmp_path, "missing")
    assert (tmp_path / NAME).read_bytes() == spoilt  # nothing better has come
    assert get(server, tmp_path, "good") == CONTENT
    assert (tmp_path / NAME).read_bytes() == CONTENT and os.listdir(tmp_path) == [NAME]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_fetch_interrupted_while_it_writes(server, tmp_path, monkeypatch, stop):
    def fail(*args): raise stop("now")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as m:
            m.setattr(data.os, name, fail)
            with pytest.raises(stop): get(server, tmp_path, "good")
        assert os.listdir(tmp_path) == []
    assert get(server, tmp_path, "good") == CONTENT


def test_fetch_without_a_server(tmp_path):
    with socket.socket() as s:  # a port that nobody listens on
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for mirror in (f"http://127.0.0.1:{port}", "http://no.such.host.invalid/", "http://[bad", "http://a b/"):
        with pytest.raises(DownloadError, match="digits()"): fetch(NAME, SIZE, SHA, [mirror], tmp_path, timeout=5)


def test_fetch_takes_one_mirror_as_text(server, tmp_path):
    assert fetch(NAME, SIZE, SHA, server.url("good").rstrip("/"), tmp_path) == CONTENT


def test_fetch_opens_no_local_files(tmp_path):
    (tmp_path / NAME).write_bytes(CONTENT)
    with pytest.raises(DownloadError, match="not an http"):
        fetch(NAME, SIZE, SHA, [tmp_path.as_uri()], tmp_path / "cache")


@pytest.mark.parametrize("name", ["", "..", ".", "../x", "a/b", "/etc/passwd"])
def test_fetch_wants_a_plain_name(tmp_path, name):
    with pytest.raises(ValueError, match="no file name"): fetch(name, 1, "", [], tmp_path)


@pytest.fixture
def small_mnist(server, monkeypatch):
    "A server with four small files that pass for MNIST's."
    g = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 7), ("t10k", 3)):
        arrays[f"{part}-images-idx3-ubyte.gz"] = g.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte.gz"] = g.integers(0, 10, n, dtype=np.uint8)
    server.files = {name: gzip.compress(idx(a)) for name, a in arrays.items()}
    sums = {name: (len(raw), hashlib.sha256(raw).hexdigest()) for name, raw in server.files.items()}
    monkeypatch.setattr(data, "MNIST_FILES", {name: sums[name] for name in data.MNIST_FILES})
    return arrays


def test_mnist(server, small_mnist, tmp_path):
    s = mnist(tmp_path, mirrors=[server.url("missing"), server.url("good")])
    assert [tuple(t.shape) for t in s] == [(7, 784), (7,), (3, 784), (3,)]
    assert [t.dtype for t in s] == [torch.float32, torch.int64] * 2
    images = small_mnist["train-images-idx3-ubyte.gz"]
    np.testing.assert_array_equal(s.x_train.numpy(), images.reshape(7, 784).astype(np.float32) / 255)
    np.testing.assert_array_equal(s.y_valid.numpy(), small_mnist["t10k-labels-idx1-ubyte.gz"])
    asked = len(server.asked)
    again = mnist(tmp_path, flat=False, mirrors=[])
    assert again.x_valid.shape == (3, 1, 28, 28) and len(server.asked) == asked
    assert torch.equal(again.x_valid.reshape(3, 784), s.x_valid)


def test_mnist_fetches_only_the_spoilt_file_again(server, small_mnist, tmp_path):
    mnist(tmp_path, mirrors=[server.url("good")])
    name = "t10k-labels-idx1-ubyte.gz"
    (tmp_path / name).write_bytes(b"spoilt")
    server.asked.clear()
    mnist(tmp_path, mirrors=[server.url("good")])
    assert server.asked == [f"/good/{name}"]


def test_mnist_default_cache(server, small_mnist, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setattr(data, "MNIST_MIRRORS", (server.url("good"),))
    mnist()
    assert sorted(os.listdir(tmp_path / ".cache" / "fromfound")) == sorted(data.MNIST_FILES)


def test_mnist_offline(tmp_path):
    with pytest.raises(DownloadError, match=r"digits\(\)"): mnist(tmp_path, mirrors=[])
    assert all(m.startswith("https://") for m in data.MNIST_MIRRORS) and len(data.MNIST_MIRRORS) >= 2
    assert [size for size, _ in data.MNIST_FILES.values()] == [9912422, 28881, 1648877, 4542]
    assert all(len(sha) == 64 for _, sha in data.MNIST_FILES.values())
