"""fromfound.data: the digits, the spiral, and MNIST from servers that serve, lie, break off or are away."""
import gzip
import hashlib
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fromfound import data
from fromfound.data import Split, digits, mnist, spiral


def test_digits():
    s = digits()
    assert isinstance(s, Split) and s._fields == ("x_train", "y_train", "x_valid", "y_valid")
    assert [tuple(t.shape) for t in s] == [(1442, 64), (1442,), (355, 64), (355,)]
    assert [t.dtype for t in s] == [torch.float32, torch.int64] * 2
    x, y = torch.cat([s.x_train, s.x_valid]), torch.cat([s.y_train, s.y_valid])
    assert x.min() == 0 and x.max() == 1 and torch.equal(x * 16, (x * 16).round())
    assert y.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_the_two_parts_are_the_whole_file():
    s, table = digits(), torch.from_numpy(data._digits_table())
    rows = torch.cat([torch.cat([s.x_train * 16, s.y_train[:, None]], 1), torch.cat([s.x_valid * 16, s.y_valid[:, None]], 1)])
    assert sorted(rows.long().tolist()) == sorted(table.long().tolist())


def test_digits_with_channels_are_the_same():
    for a, b in zip(digits(), digits(flat=False)): assert_close(a.reshape(b.shape), b)
    assert digits(flat=False).x_train.shape == (1442, 1, 8, 8)


def test_licence_is_beside_the_file():
    text = (data.resources.files("fromfound") / "digits.LICENSE").read_text(encoding="utf-8")
    for word in ("Alpaydin", "Kaynak", "CC BY 4.0", "https://doi.org/10.24432/C50P49"): assert word in text and word in digits.__doc__


@given(n=st.integers(1, 30), k=st.integers(1, 6), noise=st.floats(0, 2), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_spiral(n, k, noise, seed):
    x, y = spiral(n, k, noise, generator=torch.Generator().manual_seed(seed))
    again, _ = spiral(n, k, noise, generator=torch.Generator().manual_seed(seed))
    assert x.shape == (n * k, 2) and x.dtype == torch.float32 and torch.equal(x, again)
    assert torch.equal(y, torch.arange(k).repeat_interleave(n))
    assert_close(x.norm(dim=1), torch.linspace(0, 1, n).repeat(k), atol=1e-5, rtol=1e-5)  # noise turns points, no more


# ---- MNIST, with small files of our own

def idx(array):
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes(), mtime=0)


ARRAYS = [np.arange(2 * 784).astype(np.uint8).reshape(2, 28, 28), np.array([3, 9], np.uint8),
          np.full((1, 28, 28), 255, np.uint8), np.array([7], np.uint8)]
FILES = {name: idx(array) for name, array in zip(data.MNIST_FILES, ARRAYS)}


class Server(ThreadingHTTPServer):
    def __init__(self, files):
        server = self
        self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.rpartition("/")[2]
                server.asked.append(name)
                body, length = files.get(name, (None, 0))
                self.send_response(200 if body is not None else 404)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if body is not None: self.wfile.write(body)

            def log_message(self, *args): pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self): return f"http://127.0.0.1:{self.server_port}/mnist/"


@pytest.fixture
def serve(monkeypatch):
    servers = []
    def start(*file_sets):
        servers.extend(map(Server, file_sets))
        monkeypatch.setattr(data, "MNIST_MIRRORS", [s.url for s in servers])
        monkeypatch.setattr(data, "MNIST_FILES", {n: hashlib.sha256(b).hexdigest() for n, b in FILES.items()})
        return servers
    yield start
    for server in servers: server.shutdown(), server.server_close()


GOOD = {name: (body, len(body)) for name, body in FILES.items()}


def test_mnist_is_downloaded_once(serve, tmp_path):
    (server,) = serve(GOOD)
    s = mnist(tmp_path / "a" / "cache")
    assert_close(s.x_train * 255, torch.tensor(ARRAYS[0].reshape(2, 784)).float())
    assert s.y_train.tolist() == [3, 9] and s.y_valid.tolist() == [7] and s.y_train.dtype == torch.int64
    assert mnist(tmp_path / "a" / "cache", flat=False).x_valid.shape == (1, 1, 28, 28)
    assert sorted(server.asked) == sorted(FILES)


@pytest.mark.parametrize("bad", [
    {},  # not found
    {name: (b"something else", 14) for name in FILES},  # the wrong contents
    {name: (body[:50], len(body)) for name, body in FILES.items()},  # breaks off
])
def test_another_mirror_is_asked_and_nothing_bad_is_kept(serve, tmp_path, bad):
    serve(bad, GOOD)
    assert mnist(tmp_path).y_train.tolist() == [3, 9]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(FILES)
    for name, body in FILES.items(): assert (tmp_path / name).read_bytes() == body


def test_when_no_mirror_has_it(serve, tmp_path):
    serve({}, {name: (b"no", 2) for name in FILES})
    with pytest.raises(OSError, match="Without a network, use digits") as error: mnist(tmp_path)
    assert str(error.value).count("http://") == 2 and not list(tmp_path.iterdir())
