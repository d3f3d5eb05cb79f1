"""fromfound.plots: what the helpers accept, what they draw, and that importing them changes nothing."""
import base64
import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from fromfound import plots
from fromfound.exercises import try_answer

ROOT = Path(__file__).parent.parent


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


KINDS = {
    "float32 with grad": lambda m: torch.tensor(m, dtype=torch.float32, requires_grad=True),
    "bfloat16": lambda m: torch.tensor(m, dtype=torch.bfloat16),
    "float16 array": lambda m: np.array(m, dtype=np.float16),
    "int64": lambda m: torch.tensor(m).long(),
    "bool": lambda m: torch.tensor(m) > 0,
    "list": lambda m: m,
    "list of tensors": lambda m: [torch.tensor(row) for row in m],
    "not contiguous": lambda m: torch.tensor(m).T.contiguous().T,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_numbers(kind):
    make = KINDS[kind]
    m = make([[0, 1, 2, 1], [3, 0, 1, 2]])
    before = m.clone() if isinstance(m, torch.Tensor) else None
    assert len(drawn(plots.show_matrix(m))) == 8
    assert len(plots.show_images(m)) == 2
    assert plots.draw_cells(plots.canvas(4, 2), m) == (4, 2)
    plots.plot_curves({"a": m[0], "b": m[1]})
    if before is not None: assert torch.equal(m, before)


def test_import_changes_no_settings():
    code = ("import matplotlib; before = dict(matplotlib.rcParams); import fromfound.plots; "
            "print({k for k in before if k != 'backend' and before[k] != matplotlib.rcParams[k]})")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert out.strip() == "set()"


def test_style_leaves_no_warnings_and_works_twice(recwarn, tmp_path):
    plots.use_style()
    plots.show_matrix(torch.eye(3))
    plt.savefig(tmp_path / "a.png")
    plots.draw_cells(plots.canvas(3, 2), [1, 2])
    plt.savefig(tmp_path / "b.png", bbox_inches="tight")
    plots.draw_graph("ab", [("a", "b")])
    plt.savefig(tmp_path / "c.png")
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_lines_differ_in_more_than_colour():
    cycle = list(matplotlib.rcParams["axes.prop_cycle"])
    assert len({str(c["linestyle"]) for c in cycle}) == len(cycle) == 7
    assert len(plots.LINE_STYLES) == len(set(plots.MARKERS)) == 7
    assert [c["color"] for c in cycle] == plots.COLORS[:7] and len(set(plots.COLORS)) == 8


@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 16), (5, 1, 3, 4), (5, 3, 4, 4), (1, 2, 2)])
def test_images_shapes(shape):
    axes = plots.show_images(torch.rand(shape), titles=range(shape[0]), ncols=2)
    assert len(axes) == shape[0] and [ax.get_title() for ax in axes] == [str(i) for i in range(shape[0])]


def test_images_share_one_scale():
    axes = plots.show_images([[[0.0, 1.0]], [[2.0, 8.0]], [[float("nan"), float("inf")]]])
    assert {ax.images[0].get_clim() for ax in axes} == {(0.0, 8.0)}
    assert plots.show_images(torch.ones(2, 4, 4))[0].images[0].get_clim() == (0, 1)  # constant, and not blank
    assert plots.show_images(torch.ones(2, 4, 4), vmin=-3, vmax=3)[1].images[0].get_clim() == (-3, 3)


@pytest.mark.parametrize("bad", [(5, 7), (4,), (2, 5, 4, 4), (0, 4, 4), ()])
def test_images_refuse_shapes(bad):
    with pytest.raises(ValueError, match="show_images"): plots.show_images(torch.rand(bad))
    assert not plt.get_fignums()  # no empty figure is left


def test_images_refuse_the_rest():
    with pytest.raises(ValueError, match="titles"): plots.show_images(torch.rand(2, 4), titles=["a"])
    with pytest.raises(ValueError, match="ncols"): plots.show_images(torch.rand(2, 4), ncols=0)
    for bad in (None, "text", [["a", "b"]]):
        with pytest.raises(TypeError): plots.show_images(bad)


def test_matrix_texts():
    assert drawn(plots.show_matrix([[1.0, 2.0], [3.0, -4.0]])) == ["1", "2", "3", "−4"]
    odd = [0.5, float("nan"), float("inf"), -float("inf")]
    assert drawn(plots.show_matrix(odd)) == ["0.50", "nan", "inf", "−inf"]
    assert drawn(plots.show_matrix([0.5, 0.25], fmt=".3f")) == ["0.500", "0.250"]
    assert drawn(plots.show_matrix([0.5, 0.25], fmt="")) == []
    assert len(drawn(plots.show_matrix(torch.rand(31, 2)))) == 0
    assert len(drawn(plots.show_matrix(torch.rand(31, 2), fmt=".1f"))) == 62
    assert drawn(plots.show_matrix(torch.zeros(2, 2))) == ["0"] * 4


def test_matrix_text_stands_out():
    ax = plots.show_matrix(torch.linspace(-1, 1, 21))
    image = ax.images[0]
    for t, v in zip(ax.texts, np.linspace(-1, 1, 21)):
        r, g, b, _ = image.cmap(image.norm(v))
        light = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (r, g, b)]
        luminance = 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2]
        contrast = (luminance + 0.05) / 0.05 if t.get_color() == "black" else 1.05 / (luminance + 0.05)
        assert contrast > 4.5


def test_matrix_on_given_axes_and_labels():
    _, axes = plt.subplots(1, 2)
    labels = dict(row_labels=["a", "b"], col_labels=torch.tensor([5, 6]))
    ax = plots.show_matrix(torch.eye(2), ax=axes[1], title="I", **labels)
    assert ax is axes[1] and ax.get_title() == "I"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["5", "6"]


@pytest.mark.parametrize("bad", [torch.zeros(2, 2, 2), torch.tensor(1.0), torch.zeros(0, 3), torch.zeros(0)])
def test_matrix_refuses(bad):
    with pytest.raises(ValueError, match="show_matrix"): plots.show_matrix(bad)
    assert not plt.get_fignums()


def test_cells():
    ax = plots.canvas(6, 3)
    assert plots.draw_cells(ax, [["a", "b"], [1, 3]], (1, 1), label="m", size=(2, 1)) == (5, 3)
    assert drawn(ax) == ["a", "b", "1", "3", "m"]
    assert ax.get_xlim() == (0, 6) and ax.get_ylim() == (3, 0)  # the canvas stays as it was
    free = plt.subplots()[1]
    plots.draw_cells(free, torch.arange(3), (2, 1), virtual=[True, False, True], hatch="//")
    drawn(free)
    low, high = free.get_xlim()
    assert low <= 2 and high >= 5 and free.yaxis_inverted()


def test_cells_refuse():
    ax = plots.canvas(3, 3)
    with pytest.raises(ValueError, match="two dimensions"): plots.draw_cells(ax, torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="virtual"): plots.draw_cells(ax, torch.zeros(2, 3), virtual=[True, False])
    with pytest.raises(ValueError, match="canvas"): plots.canvas(3, -1)
    assert not ax.patches


def test_curves():
    curves = {"a": [1, 10, float("inf"), 100], "b": [1, 0, -1, 2]}
    ax = plots.plot_curves(curves, x=torch.tensor([1, 2, 4, 8]), logx=True, logy=True)
    crosses = [line for line in ax.lines if line.get_marker() == "x"]
    assert [list(c.get_xdata()) for c in crosses] == [[2], [1]]
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    drawn(ax)
    drawn(plots.plot_curves({str(k): torch.rand(3) for k in range(9)}, legend=False))
    for bad in ({}, {"a": torch.zeros(2, 2)}, {"a": 3.0}):
        with pytest.raises(ValueError, match="plot_curves"): plots.plot_curves(bad)


def test_bars():
    ax = plots.plot_bars({"a": torch.tensor(2.0), "b": 12345, "c": 0.000123})
    assert drawn(ax) == ["2", "12,345", "0.000123"] and ax.yaxis_inverted()
    assert drawn(plots.plot_bars({"a": 2}, fmt=".1f", log=True)) == ["2.0"]
    for bad in ({}, {"a": -1}, {"a": float("nan")}):
        with pytest.raises(ValueError, match="plot_bars"): plots.plot_bars(bad)


EDGES = [("x", "a"), ("x", "b"), ("a", "y"), ("b", "y"), ("x", "y"), ("w", "y")]


def test_graph_layout():
    place, passes = plots._layout(list("xabyw"), EDGES)
    assert {n: c for n, (c, _) in place.items()} == dict(x=0, a=1, b=1, w=1, y=2)
    spots = [*place.values(), *passes["x", "y"]]
    assert len(set(spots)) == len(spots) == 6
    chain = [(k, k + 1) for k in range(500)]
    assert plots._layout(list(range(501)), chain)[0][500] == (500, 0)


def test_graph_texts():
    values = {"x": torch.tensor(0.5, requires_grad=True), "y": "?"}
    grads = {"x": np.float32(-2), "y": torch.tensor([1.0])}
    texts = drawn(plots.draw_graph("xabyw", EDGES, values, grads, edge_labels={("x", "a"): "d"}, backward=True))
    for t in ("x", "0.50", "∂ −2.00", "?", "∂ 1.00", "d"): assert t in texts
    only_values = drawn(plots.draw_graph(["x"], [], values={"x": 3}))
    assert [t for t in only_values if t] == ["x", "3"]


def test_graph_options():
    _, ax = plt.subplots()
    nodes, places = {1: "one", 2: "two"}, {1: (0, 1), 2: (2, 0)}
    assert plots.draw_graph(nodes, [(1, 2), (1, 2)], ax=ax, positions=places) is ax
    drawn(ax)
    drawn(plots.draw_graph(["only"], [], spacing=(1, 1)))


def test_graph_refuses():
    for nodes, edges, more in (
        ([], [], {}), ("ab", [("a", "c")], {}), ("ab", [("a", "b"), ("b", "a")], {}), ("a", [("a", "a")], {}),
        ("ab", [], dict(grads={"z": 1})), ("ab", [], dict(positions={"z": (0, 0)})),
        ("ab", [], dict(edge_labels={("a", "z"): ""})),
    ):
        with pytest.raises(ValueError, match="draw_graph"): plots.draw_graph(nodes, edges, **more)
        assert not plt.get_fignums()


def test_stored_figures_hold_no_version_and_are_small():
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                if "image/png" not in output.get("data", {}): continue
                png = base64.b64decode("".join(output["data"]["image/png"]))
                assert b"Software" not in png, f"{path.name}: a figure drawn before use_style()"
                assert len(png) < 120_000, f"{path.name}: a figure of {len(png)} bytes"


def test_try_answer(capsys):
    def check(f): assert f(2) == 4, "2 and 2 is 4"
    def stub(x): raise NotImplementedError("your turn")
    def part(x): raise NotImplementedError("the other half")
    try_answer(check, lambda x: x + 2)
    try_answer(check, stub)
    try_answer(check, part)
    assert capsys.readouterr().out.splitlines() == ["right", "not answered yet", "not answered yet: the other half"]
    with pytest.raises(AssertionError, match="2 and 2 is 4"): try_answer(check, lambda x: x)
    with pytest.raises(TypeError): try_answer(check, lambda: 4)
