"""fromfound.plots and fromfound.exercises: what is drawn, and what a check says about an answer."""
import base64
import json
import re
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import NOTEBOOKS

from fromfound import plots
from fromfound.exercises import expect, expect_call, hint, hints, must_reject, torch_calls, try_answer


@pytest.fixture(autouse=True)
def style():
    with matplotlib.rc_context():
        plots.use_style()
        yield
        plt.close("all")


def drawn(ax):
    "Draw the figure, so that what fails late fails here; return the texts on the axes."
    ax.figure.canvas.draw()
    return [t.get_text() for t in ax.texts]


@pytest.mark.parametrize("make", [lambda m: torch.tensor(m, dtype=torch.float32, requires_grad=True), torch.tensor, np.array,
                                  lambda m: m, lambda m: [torch.tensor(row) for row in m]])
def test_every_kind_of_numbers(make):
    m = make([[0, 1, 2, 1], [3, 0, 1, 2]])
    assert len(drawn(plots.show_matrix(m))) == 8
    assert len(plots.show_images(m)) == 2
    assert plots.draw_cells(plots.canvas(4, 2), m) == (4, 2)
    drawn(plots.plot_curves({"a": m[0], "b": m[1]}))


def test_import_changes_no_settings():
    code = ("import matplotlib; before = dict(matplotlib.rcParams); import fromfound.plots; "
            "print({k for k in before if k != 'backend' and before[k] != matplotlib.rcParams[k]})")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_lines_differ_in_more_than_colour():
    cycle = list(matplotlib.rcParams["axes.prop_cycle"])
    assert len({str(c["linestyle"]) for c in cycle}) == len(cycle) == 7 == len(plots.LINE_STYLES) == len(set(plots.MARKERS))
    assert [c["color"] for c in cycle] == plots.COLORS[:7] and len(set(plots.COLORS)) == 8


@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 16), (5, 1, 3, 4), (5, 3, 4, 3), (1, 2, 2)])
def test_images(shape):
    axes = plots.show_images(torch.rand(shape), titles=range(shape[0]), ncols=2)
    assert len(axes) == shape[0] and [ax.get_title() for ax in axes] == [str(i) for i in range(shape[0])]
    assert {ax.images[0].get_clim() for ax in plots.show_images([[[0.0, 1.0]], [[2.0, 8.0]]])} == {(0.0, 8.0)}


def test_matrix():
    assert drawn(plots.show_matrix([[1, 2], [3, -4]])) == ["1", "2", "3", "−4"]
    assert drawn(plots.show_matrix([[0.5, 0.25]], fmt=".3f")) == ["0.500", "0.250"]
    _, axes = plt.subplots(1, 2)
    ax = plots.show_matrix(torch.eye(2), ax=axes[1], title="I", row_labels=["a", "b"], col_labels=[5, 6])
    assert ax is axes[1] and ax.get_title() == "I"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"] and [t.get_text() for t in ax.get_xticklabels()] == ["5", "6"]


def test_matrix_text_stands_out():
    values = torch.linspace(-1, 1, 21)[None]
    ax = plots.show_matrix(values)
    for t, v in zip(ax.texts, values[0].tolist()):
        rgb = np.array(ax.images[0].cmap(ax.images[0].norm(v))[:3])
        luminance = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
        assert ((luminance + 0.05) / 0.05 if t.get_color() == "black" else 1.05 / (luminance + 0.05)) > 4.5


def test_cells():
    ax = plots.canvas(6, 3)
    assert plots.draw_cells(ax, np.array([["a", "b"], ["1", "3"]]), (1, 1), label="m", size=(2, 1)) == (5, 3)
    assert drawn(ax) == ["a", "b", "1", "3", "m"]
    assert ax.get_xlim() == (0, 6) and ax.get_ylim() == (3, 0)
    drawn_copies = plots.canvas(4, 1)
    plots.draw_cells(drawn_copies, torch.arange(3), virtual=[True, False, True], hatch="//")
    assert [t.get_style() for t in drawn_copies.texts] == ["italic", "normal", "italic"]


def test_curves():
    curves = {"a": [1, 10, float("inf"), 100], "b": [1, 0, -1, 2]}
    ax = plots.plot_curves(curves, x=torch.tensor([1, 2, 4, 8]), logx=True, logy=True)
    crosses = [line for line in ax.lines if line.get_marker() == "x"]
    assert [list(c.get_xdata()) for c in crosses] == [[2], [1]]  # where they stop being finite, or positive
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    drawn(plots.plot_curves({"short": [1, 2], "long": [1, 2, 3, 4]}, legend=False))


def test_graph():
    edges = [("x", "a"), ("x", "b"), ("a", "y"), ("b", "y"), ("x", "y"), ("w", "y")]
    place = plots._positions(list("xabyw"), edges)
    assert {n: c for n, (c, _) in place.items()} == dict(x=0, a=1, b=1, w=0, y=2) and len(set(place.values())) == 5
    values, grads = {"x": torch.tensor(0.5, requires_grad=True), "y": "?"}, {"x": np.float32(-2), "y": torch.tensor([1.0])}
    texts = drawn(plots.draw_graph("xabyw", edges, values, grads, edge_labels={("x", "a"): "d"}, backward=True))
    for t in ("x", "0.50", "∂ −2.00", "?", "∂ 1.00", "d"): assert t in texts
    drawn(plots.draw_graph({1: "one", 2: "two"}, [(1, 2), (1, 2)], positions={1: (0, 1), 2: (2, 0)}, spacing=(1, 1)))


def test_stored_figures_hold_no_version_and_are_small():
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                if "image/png" not in output.get("data", {}): continue
                png = base64.b64decode("".join(output["data"]["image/png"]))
                if path.stem != "plots":  # which shows matplotlib's own style too
                    assert b"Software" not in png, f"{path.name}: a figure drawn before use_style()"
                assert len(png) < 300_000, f"{path.name}: a figure of {len(png)} bytes"


# ---- sliders

def draw_line(slope=1.0, name="a"):
    return plots.plot_curves({name: [0, slope]}, title=f"{name} {slope}")


class Shown:
    "Stands in for what IPython shows: remembers the titles of the figures."
    def __init__(self): self.titles, self.widgets = [], []
    def __call__(self, thing, display_id=False):
        if display_id: self.update(thing)
        else: self.widgets.append(thing)
        return self
    def update(self, figure): self.titles.append(figure.axes[0].get_title())


@pytest.fixture
def shown(monkeypatch):
    for name in ("JPY_SESSION_NAME", "VSCODE_PID"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("IPython.display.display", shown := Shown())
    return shown


def test_sliders_without_a_reader_show_the_figure_alone(shown):
    plots.sliders(draw_line, slope=(0.0, 2.0))
    assert shown.titles == ["a 1.0"] and not shown.widgets and not plt.get_fignums()


def test_sliders_redraw_in_place(shown, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "a chapter that somebody reads")
    plots.sliders(draw_line, slope=(0.0, 2.0, 0.5), name=["a", "b"])
    (box,) = shown.widgets
    slope, name = box.children[:2]
    assert (slope.value, name.value) == (1.0, "a"), "they begin where the figure does"
    slope.value = 1.5
    box.update()
    name.value = "b"
    box.update()
    assert shown.titles[0] == "a 1.0" and shown.titles[-1] == "b 1.5" and "a 1.5" in shown.titles and not plt.get_fignums()


# ---- exercises

@hints("think", "add")
def check_double(f): expect_call(f, (2,), 4)


def test_try_answer(capsys):
    def stub(x): raise NotImplementedError("your turn")
    try_answer(check_double, lambda x: x + 2)
    try_answer(check_double, stub)
    assert capsys.readouterr().out.splitlines() == ["Right.", "Not answered yet. If you're stuck: hint(1), up to hint(2)."]
    with pytest.raises(AssertionError, match=r"^<lambda>\(2\) is wrong\n  expected 4\n  yours    2\nIf you're stuck: hint\(1\)"):
        try_answer(check_double, lambda x: x)


def test_only_a_stub_is_unanswered(capsys):
    "PyTorch raises NotImplementedError too, for a dtype that it can't handle."
    with pytest.raises(NotImplementedError): try_answer(hints("a", "b")(lambda f: f(2)), lambda x: torch.eye(x, dtype=torch.int64).softmax(0))
    assert "Not answered" not in capsys.readouterr().out


def test_hints_come_one_at_a_time(capsys):
    try_answer(check_double, lambda x: x + 2)
    capsys.readouterr()
    hint(1)
    assert capsys.readouterr().out == "double, hint 1 of 2: think\n"
    with pytest.raises(ValueError, match="hints 1 to 2, not 0"): hint(0)


def test_expect_accepts():
    expect("f()", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 1e-7]))
    expect("f()", torch.tensor([1.0], requires_grad=True), torch.tensor([1.0]))
    expect("f()", torch.tensor([True]), torch.tensor([True]))
    expect("f()", lambda: 0.3, 0.1 + 0.2)
    expect("f()", 1, 1.0)
    expect("f()", ["a"], ["a"])


@pytest.mark.parametrize("actual, expected, message", [
    (torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]]), "f(2) is wrong\n  first at [0, 1], where 3.0 is expected and yours is 2.0\n"
     "  expected tensor of shape (1, 2), float32: [[1., 3.]]\n  yours    tensor of shape (1, 2), float32: [[1., 2.]]"),
    (torch.tensor([1.0]), torch.tensor([[1.0]]), "f(2) is wrong\n  expected tensor of shape (1, 1), float32: [[1.]]\n  yours    tensor of shape (1,), float32"),
    (torch.zeros(5, 3), torch.zeros(3, 5), "expected tensor of shape (3, 5), float32\n  yours    tensor of shape (5, 3), float32"),
    (torch.tensor([1]), torch.tensor([1.0]), "yours    tensor of shape (1,), int64: [1]"),
    ([1.0], torch.tensor([1.0]), "yours    [1.0]"),
    (None, 1.0, "expected 1.0\n  yours    None"),
    ("1", 1.0, "yours    '1'"),
    (torch.tensor([float("nan")]), torch.tensor([1.0]), "at [0], where 1.0 is expected and yours is nan"),
    (torch.tensor(2.0), torch.tensor(1.0), "f(2) is wrong\n  expected tensor of shape (), float32: 1."),
    (0.5, 0.25, "f(2) is wrong\n  expected 0.25\n  yours    0.5"),
    (["b"], ["a"], "expected ['a']\n  yours    ['b']"),
    (lambda: {}["key"], 1, "f(2) stops with KeyError: 'key'"),
    (lambda: torch.eye(2, dtype=torch.int64).softmax(0), 1, "f(2) stops with NotImplementedError"),
])
def test_expect_says_what_differs(actual, expected, message):
    with pytest.raises(AssertionError, match=re.escape(message)): expect("f(2)", actual, expected)


def test_must_reject():
    must_reject(check_double, lambda x: x, lambda x: x**3, lambda x: None, lambda: 4)
    with pytest.raises(AssertionError, match="check_double lets wrong answer 2 through"): must_reject(check_double, lambda x: x, lambda x: x**2)


def test_torch_calls():
    assert torch_calls(lambda a: (a @ a).sum(), torch.eye(2)) == ["matmul", "sum"]
