"""The site's files: what nbdev and Quarto share, the reading order, and no page that asks another host."""
import ast
import base64
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import BEFORE, NOTEBOOKS, ROOT, code_cells, load, source
from test_notebooks import CHAPTERS, MODULE_OF, has_picture

pytestmark = pytest.mark.committed

yaml = pytest.importorskip("yaml")  # nbdev brings it


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def entries(contents: list) -> list[str]:
    return [name for item in contents for name in ([item] if isinstance(item, str) else entries(item["contents"]))]


def test_nbdev_and_quarto_share_one_file():
    root, nbs, bridge = read("_quarto.yml"), read("nbs/_quarto.yml"), read("nbs/_root.yml")
    assert root["project"] == {"type": "website", "output-dir": "_docs"} and root["metadata-files"] == ["nbs/_root.yml"]
    assert nbs == {"project": {"type": "website"}, "metadata-files": ["../_quarto.yml", "nbdev.yml", "sidebar.yml"]}
    assert bridge == {"project": {"type": "default", "pre-render": "nbdev_docs", "render": ["!*"]}}
    assert "custom_quarto_yml" not in (ROOT / "settings.ini").read_text()


def test_sidebar_is_the_reading_order():
    "“Next” leads from the home page to the primer, the first chapter and on to the last; what stands beside the chapters comes after them."
    listed = entries(read("nbs/sidebar.yml")["website"]["sidebar"]["contents"])
    chapters = [path.name for path in CHAPTERS]
    assert listed[: len(chapters) + 2] == ["index.ipynb", "python_primer.ipynb", *chapters]
    assert set(listed) == {p.name for p in NOTEBOOKS} and len(listed) == len(NOTEBOOKS), "a notebook is missing from the sidebar"


def test_light_dark_mathml_and_no_foreign_host():
    html = read("_quarto.yml")["format"]["html"]
    assert html["theme"] == {"light": ["cosmo", "site.scss"], "dark": ["darkly", "site.scss"]}
    assert html["html-math-method"] == "mathml" and html["respect-user-color-scheme"] is True
    scss = (ROOT / "nbs" / "site.scss").read_text()
    assert "$web-font-path: false;" in scss and "url(" not in scss and "@import" not in scss
    css = ROOT / "nbs" / html["css"]
    (font,) = re.findall(r'url\("([^"]+)"\)', css.read_text())
    assert (css.parent / font).read_bytes()[:4] == b"wOF2" and list(css.parent.glob("*LICENSE"))
    assert re.search(r'font-family: "(.+?)"', css.read_text()).group(1) in re.search(r"^math \{.*", scss, re.MULTILINE).group()
    favicon = read("_quarto.yml")["website"]["favicon"]
    assert (ROOT / "nbs" / favicon).exists()


def contrast(a: str, b: str) -> float:
    "WCAG 2.1's contrast ratio of two colours written #rrggbb."
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(a), luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_navbar_is_readable():
    navbar = read("_quarto.yml")["website"]["navbar"]
    assert contrast(navbar["background"], navbar["foreground"]) >= 4.5


@pytest.mark.parametrize("theme, ground", [("light", "#ffffff"), ("dark", "#222222")])  # the page colours of cosmo and darkly
def test_text_has_contrast(theme, ground):
    "Captions, breadcrumbs, folds, previous and next; in the dark theme also table headers and code in headings."
    scss = (ROOT / "nbs" / "site.scss").read_text()
    rules = re.search(rf"^body\.quarto-{theme} \{{\n(.*?)^\}}", scss, re.MULTILINE | re.DOTALL).group(1)
    for part in ["figcaption", "breadcrumb", "page-navigation", "summary"] + ["th", "h2", "code"] * (theme == "dark"):
        assert re.search(rf"\b{part}\b", rules), f"{part} has no colour of its own"
    for line in rules.splitlines():
        behind = re.search(r"background-color: (#\w{6})", line)
        for colour in re.findall(r"(?<![-\w])color: (#\w{6})", line):
            assert contrast(colour, behind.group(1) if behind else ground) >= 4.5, line


def test_svg_pictures_are_self_contained():
    for path in (ROOT / "nbs" / "images").rglob("*.svg"):
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:", text), path


def test_what_is_generated_is_ignored_by_git():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/_docs/", "/_proc/", "/nbs/nbdev.yml", "/.quarto/", "**/*.quarto_ipynb"} <= set(ignored)


def test_nbdev_reads_the_settings():
    code = "from nbdev.config import get_config; c = get_config(); print(c.lib_name, c.nbs_path.name, c.doc_path.name, c.custom_sidebar)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.split() == ["fromfound", "nbs", "_docs", "True"]


# --- what a page shows


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, list]:
    "The cells of each page as nbdev hands them to Quarto, by the notebook's name."
    copy = tmp_path_factory.mktemp("site")
    for name in ("nbs", "fromfound"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", copy)
    done = subprocess.run([sys.executable, "-c", "from nbdev.serve import proc_nbs; proc_nbs()"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (copy / "_proc" / "fonts" / "math.css").exists() and (copy / "_proc" / "images" / "favicon.svg").exists()
    return {path.stem: load(path)["cells"] for path in (copy / "_proc").glob("*.ipynb")}


def code_of(text: str) -> str:
    return re.sub(r"^#\|.*\n", "", text, flags=re.MULTILINE).strip()


def test_all_code_that_a_lesson_shows_is_on_its_page(pages, notebook):
    on_page = [code_of(source(cell)) for cell in pages[notebook.stem] if cell["cell_type"] == "code"]
    hidden = re.compile(r"^#\|\s*(hide|export|default_exp)\b", re.MULTILINE)
    for cell in code_cells(notebook):
        if hidden.search(source(cell)):
            defined = [n for n in ast.parse(source(cell)).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))] if "#| export" in source(cell) else []
            assert not defined, f"`#| exports` would show it: {defined[0].name}"
        else: assert code_of(source(cell)) in on_page, source(cell)
    assert not any("show_doc" in code for code in on_page)


def test_options_of_a_cell_stand_once(pages, notebook):
    "Quarto refuses a cell with an option twice."
    for cell in pages[notebook.stem]:
        options = re.findall(r"^#\|\s*([\w-]+):", source(cell), re.MULTILINE) if cell["cell_type"] == "code" else []
        assert len(options) == len(set(options)), source(cell)


def test_introduction_is_on_the_page(pages, notebook):
    "nbdev makes front matter of a notebook's first cell, and drops all of it but title and subtitle."
    first = source(load(notebook)["cells"][0])
    assert re.fullmatch(r"# .+\n\n> .+", first), first
    text = source(load(notebook)["cells"][1])
    words = re.sub(r"\W", "", re.sub(r"\[(`[^`]+`)\]\(https://fromfound.github.io[^)]*\)", r"\1", "".join(map(source, pages[notebook.stem]))))
    assert len(text) > 200 and re.sub(r"\W", "", text) in words


def test_figures_are_sharp_and_their_code_is_folded(notebook):
    for cell in filter(has_picture, code_cells(notebook)):
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                width = struct.unpack(">I", base64.b64decode("".join(output["data"]["image/png"]))[16:20])[0]
                assert width >= 1.9 * output["metadata"]["image/png"]["width"], "as wide as it is shown"
        code = code_of(source(cell)).splitlines()
        assert len(code) <= 6 or re.search(r"code-fold: true|echo: false", source(cell)) or notebook.stem in ("index", "plots"), source(cell)


def test_badge_has_a_name_and_no_caption(notebook):
    "Quarto would make a figure, with its alt text as a caption, of a linked markdown image that is a paragraph."
    for cell in load(notebook)["cells"]:
        if cell["cell_type"] == "markdown":
            assert not re.search(r"^\[!\[", source(cell), re.MULTILINE), source(cell)
            assert all("alt=" in img for img in re.findall(r"<img[^>]*>", source(cell)))


# --- links


def headings(path: Path) -> list[str]:
    text = "\n".join(source(cell) for cell in load(path)["cells"] if cell["cell_type"] == "markdown")
    return re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)


def anchor_of(heading: str) -> str:
    "The id that Jupyter gives a heading; a script in _quarto.yml makes the same ones on the site."
    return re.sub(r"[`*]", "", heading).strip().replace(" ", "-")


def anchors(path: Path) -> set[str]:
    "The ids on a page: those of the headings, and the names that its code defines (_quarto.yml makes anchors of them)."
    found = {anchor_of(h) for h in headings(path)}
    for cell in code_cells(path): found |= {name.lower() for name in re.findall(r"^(?:def|class) (\w+)", source(cell), re.MULTILINE)}
    return found


def test_no_heading_twice(notebook):
    assert len(headings(notebook)) == len(set(headings(notebook)))


def test_internal_links_lead_somewhere(notebook, pages):
    "Those of the notebooks, and those that nbdev makes of names in backticks."
    page_of = {re.sub(r"^\d+_", "", path.stem): path for path in NOTEBOOKS}
    for cell in pages[notebook.stem]:
        if cell["cell_type"] != "markdown": continue
        links = re.findall(r"(?:\]\(|href=\")([\w./-]*\.ipynb)?(#[^)\"]+)?[)\"]", source(cell))
        links += re.findall(r"\]\((https://fromfound\.github\.io/fromfound/\w+\.html)(#[^)]+)", source(cell))
        for target, anchor in links:
            path = page_of[Path(target).stem] if target.startswith("http") else notebook.parent / target if target else notebook
            assert path.exists(), target
            assert not anchor or unquote(anchor[1:]) in anchors(path), f"{path.name} has no {anchor}"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_first_mention_of_a_chapter_is_a_link(path):
    text = "\n".join(source(cell) for cell in load(path)["cells"] if cell["cell_type"] == "markdown")
    seen = {path.stem[:2]}
    for found in re.finditer(r"(\[?)[Cc]hapters? (\[?)(\d\d)(\])?", text):
        if found.group(3) not in seen:
            assert found.group(1) or found.group(2), f"chapter {found.group(3)} is first mentioned without a link: …{text[found.start() - 60 : found.end() + 30]}…"
        seen.add(found.group(3))


def test_a_name_of_ones_own_leads_to_ones_own_page(pages, notebook):
    "Where two modules have a name, nbdev links the first of them. On the page of the second, double backticks and spaces keep it from linking."
    if notebook.stem not in MODULE_OF: return
    own = set(re.findall(r"^(?:def|class) (\w+)", (ROOT / "fromfound" / f"{MODULE_OF[notebook.stem]}.py").read_text(), re.MULTILINE))
    page = re.sub(r"^\d+_", "", notebook.stem) + ".html"
    for cell in pages[notebook.stem]:
        for name, target in re.findall(r"\[`(\w+)(?:\(\))?`\]\(https://fromfound\.github\.io/fromfound/([\w.]+)#", source(cell)) if cell["cell_type"] == "markdown" else ():
            later = target in ("engine.html", "numpy.html") and target != page and notebook.stem != "index"  # they have names of their own for what others have
            assert (name not in own or target == page) and not (later and notebook.stem < "10"), f"write `` {name} ``, or it leads to {target}"


def test_names_of_05_are_linked_by_hand():
    "nbdev leaves out files with “auto” in their names when it collects what to link."
    names = re.findall(r"'(\w+)'", re.search(r"__all__ = \[(.*?)\]", (ROOT / "fromfound" / "autograd_fn.py").read_text(), re.DOTALL).group(1))
    for path in NOTEBOOKS:
        if path.stem != "05_autograd_fn":
            for cell in load(path)["cells"]:
                for name in set(names) - {"Module"} if cell["cell_type"] == "markdown" else ():
                    assert not re.search(rf"(?<!\[)`{name}`", source(cell)), f"{path.name}: [`{name}`](05_autograd_fn.ipynb#{name.lower()})"


def test_links_of_names_are_switched_on():
    assert '"nbdev": [f' in (ROOT / "setup.py").read_text() and read("_quarto.yml")["website"]["repo-subdir"] == "nbs"
    index = subprocess.run([sys.executable, "-c", "from nbdev.doclinks import NbdevLookup as L; print(L().doc('check_grads'), L().doc('linear'))"],
                           cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert index.split() == [f"https://fromfound.github.io/fromfound/{page}" for page in ("backward.html#check_grads", "forward.html#linear")]


# --- the home page


def test_home_page_has_a_card_for_each_chapter():
    text = "\n".join(source(cell) for cell in load(ROOT / "nbs" / "index.ipynb")["cells"] if cell["cell_type"] == "markdown")
    cards = re.findall(r'<div class="chapter">\n\n(.*?)\n\n</div>', text, re.DOTALL)
    assert len(cards) == len(CHAPTERS) and not re.search(r"^\|", text, re.MULTILINE), "cards, not a table"
    for card, path in zip(cards, CHAPTERS):
        title = re.match(r"# (.+)", source(load(path)["cells"][0])).group(1)
        assert f"[{title}]({path.name})" in card and f"/nbs/{path.name}" in card and f"covers/{path.stem}.png" in card
    assert "minmax(min(100%, 15rem), 1fr)" in (ROOT / "nbs" / "site.scss").read_text(), "one column on a phone"


def test_home_page_shows_what_each_chapter_needs():
    "The arrows are the chapters that “You need …” names, less those that follow from others."
    (cell,) = [c for c in code_cells(ROOT / "nbs" / "index.ipynb") if "fig-cover-map" in source(c)]
    drawn = ast.literal_eval(re.search(r"needed = (\[.*?\])\n", source(cell), re.DOTALL).group(1))
    needs = {}
    for path in CHAPTERS:
        (text,) = re.findall(r"\*\*You need\*\*.*", source(load(path)["cells"][1]))
        needs[path.stem[:2]] = set(re.findall(r"\]\((\d\d)_\w+\.ipynb[#)]", text))
    def all_of(chapter): return needs[chapter].union(*map(all_of, needs[chapter]))
    direct = {(a, b) for b in needs for a in needs[b] if not any(a in all_of(other) for other in needs[b])}
    assert set(drawn) == direct
