"""What holds for every notebook, whatever it teaches."""
import ast
import re
import socket
import subprocess
import sys

import pytest
from conftest import BEFORE, NOTEBOOKS, ROOT, code_cells, load, source

pytestmark = pytest.mark.committed

CHAPTERS = [p for p in NOTEBOOKS if re.match(r"\d\d_", p.stem)]
MODULE_OF = {
    p.stem: found.group(1) for p in NOTEBOOKS for cell in code_cells(p)
    if (found := re.search(r"^#\|\s*default_exp\s+(\w+)", source(cell), re.MULTILINE))
}
ORDER = [name for name in BEFORE if (ROOT / "nbs" / f"{name}.ipynb").exists()] + [p.stem for p in CHAPTERS]


def has_picture(cell) -> bool:
    return any(kind in output.get("data", {}) for output in cell["outputs"] for kind in ("image/png", "image/svg+xml"))


def imported_modules(code: str) -> set[str]:
    "Which of fromfound's modules a piece of code imports."
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "fromfound":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fromfound."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fromfound.")}
    return found


def python_of(cell) -> str:
    "A cell's Python, without IPython's magics and shell lines."
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", source(cell), flags=re.MULTILINE)


def test_outputs_are_stored(notebook):
    if not code_cells(notebook): return  # the glossary
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert outputs, "no stored output: execute the notebook before it is committed"


def test_no_error_output(notebook):
    for cell in code_cells(notebook):
        assert not [o for o in cell["outputs"] if o["output_type"] == "error"], source(cell)


def test_no_warning_or_path_in_the_outputs(notebook):
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            assert output.get("name") != "stderr", f"{source(cell)}\n{output}"
            text = "".join(output.get("text", "")) + "".join(output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"/(home|root|Users|tmp|var|work)/\w", text), text


def test_every_figure_has_an_alt_text_and_a_caption(notebook):
    for cell in filter(has_picture, code_cells(notebook)):
        for key in ("fig-alt", "fig-cap"):
            found = re.search(rf"^#\|\s*{key}:\s*(.+)$", source(cell), re.MULTILINE)
            assert found and len(found.group(1)) > 25, f"{key} is missing or too short:\n{source(cell)}"


def test_outputs_ask_no_other_host(notebook):
    "JavaScript and widget outputs would make the site load their code from elsewhere; so would linked pictures."
    for cell in load(notebook)["cells"]:
        for output in cell.get("outputs", []):
            assert not [kind for kind in output.get("data", {}) if "javascript" in kind or "widget" in kind]
            html = "".join(output.get("data", {}).get("text/html", ""))
            assert not re.search(r"(src|href)=\"(https?:)?//", html), html
        if cell["cell_type"] == "markdown":
            assert not re.search(r"!\[[^\]]*\]\(https?:|<img[^>]+src=\"https?:", source(cell)), source(cell)


def test_output_lines_fit_the_page(notebook):
    "Lines beyond 90 columns are cut off on the site."
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            text = "".join(output.get("text", "")) or "".join(output.get("data", {}).get("text/plain", ""))
            for line in text.splitlines(): assert len(line) <= 90, f"{len(line)} columns: {line}"


def test_links_to_other_notebooks_lead_somewhere(notebook):
    for cell in load(notebook)["cells"]:
        if cell["cell_type"] == "markdown":
            for target in re.findall(r"\]\(([\w./-]+\.(?:ipynb|png|svg))", source(cell)):
                assert (notebook.parent / target).exists(), target


@pytest.mark.parametrize("name", ORDER)
def test_imports_only_from_before(name):
    "Data flows one way: a notebook imports the modules of earlier ones, and so does the module that it exports."
    earlier = {MODULE_OF[other] for other in ORDER[: ORDER.index(name)] if other in MODULE_OF}
    for cell in code_cells(ROOT / "nbs" / f"{name}.ipynb"):
        if not source(cell).lstrip().startswith("%%"):
            assert imported_modules(python_of(cell)) <= earlier | {MODULE_OF.get(name)}, source(cell)
    if name in MODULE_OF:
        module = (ROOT / "fromfound" / f"{MODULE_OF[name]}.py").read_text(encoding="utf-8")
        assert imported_modules(module) <= earlier


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_is_a_whole_one(path):
    text = [source(cell) for cell in load(path)["cells"]]
    assert re.match(r"# \d\d · .+\n\n> .+", text[0]), "title, then a one-line subtitle"
    assert "colab.research.google.com/github/" in text[1] and f'/{path.name}"' in text[1], "then a badge that opens it on Colab"
    assert "**The question:**" in text[1] and "**You need**" in text[1], "and the introduction"
    assert any('"google.colab" in sys.modules' in t and "%pip install" in t for t in text), "a cell that installs on Colab only"
    for heading in ("## What you have built", "## What comes next", "## Exercises"):
        assert any(re.search(rf"^{heading}", t, re.MULTILINE) for t in text), heading
    folded = [c for c in code_cells(path) if re.search(r"^#\|\s*code-fold:\s*true", source(c), re.MULTILINE)]
    assert all(c["metadata"].get("jupyter", {}).get("source_hidden") for c in folded)
    solutions = [c for c in folded if source(c).startswith("#| code-summary: Solution\n")]  # JupyterLab shows the first line
    assert len(solutions) >= 3 and not any(c["outputs"] for c in solutions), "solutions, whose output gives nothing away"
    assert any("](exercises.ipynb)" in t for t in text), "a link to how the exercises work"
    assert sum("try_answer(" in source(c) for c in code_cells(path)) >= 3
    assert sum("fig-cover-" in source(c) for c in code_cells(path)) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "fromfound").glob("*.py")), ids=lambda p: p.stem)
def test_modules_are_python_3_10(path):
    "Syntax that is newer than the oldest Python supported would not parse."
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


@pytest.mark.parametrize("path", [p for p in sorted((ROOT / "fromfound").glob("*.py")) if not p.stem.startswith("_")],
                         ids=lambda p: p.stem)
def test_public_names_are_documented(path):
    "Every public function, class and method has a docstring and types."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        assert ast.get_docstring(node), f"{path.stem}.{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            args = [a for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")]
            assert all(a.annotation for a in args), f"{path.stem}.{node.name}: a parameter has no type"
            assert node.returns is not None, f"{path.stem}.{node.name}: no return type"


def test_nothing_of_this_kind_of_machine_is_in_the_tree():
    "No absolute path of somebody's machine in what is committed."
    files = [p for d in ("nbs", "fromfound", "tests", "bench", "tools", ".github", ".ci") for p in (ROOT / d).rglob("*")]
    for path in files:
        if path.suffix in {".py", ".ipynb", ".yml", ".md", ".scss"} and ".ipynb_checkpoints" not in path.parts:
            assert not re.search(r"(?<![\w.])/(home|root|Users)/\w+/", path.read_text(encoding="utf-8")), path


def test_the_offline_guard_has_teeth():
    "`make test` runs nbdev_test under tests/offline: there, other machines are out of reach and loopback is not."
    code = """
import socket
for attempt in (lambda: socket.create_connection(("192.0.2.1", 80), timeout=2), lambda: socket.getaddrinfo("example.org", 80)):
    try: attempt()
    except OSError as e: assert "the network is off" in str(e), e
    else: raise SystemExit("the network was reached")
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
"""
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "tests" / "offline")}, check=True)
    assert 'PYTHONPATH=tests/offline "$(BIN)/nbdev_test"' in (ROOT / "Makefile").read_text()
    assert socket.socket.connect.__name__ != "guarded", "the tests themselves run without the guard"
