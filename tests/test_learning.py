"""The learner's side: exercises, questionnaire, glossary. What they say of themselves has to be true."""
import ast
import re
from urllib.parse import unquote

import pytest
from conftest import ROOT, code_cells, load, source
from test_notebooks import CHAPTERS
from test_site import anchor_of, headings

pytestmark = pytest.mark.committed

NBS = ROOT / "nbs"


# --- exercises


def exercises(path) -> dict[str, list]:
    "The cells of each exercise of a notebook, by its heading, and under None those of the whole section."
    found, section, name = {None: []}, False, None
    for cell in load(path)["cells"]:
        for level, title in re.findall(r"^(##+) (.+)$", source(cell), re.MULTILINE) if cell["cell_type"] == "markdown" else ():
            if level == "##": section, name = title == "Exercises", None
            elif section: name = title
        if section:
            found[None].append(cell)
            if name: found.setdefault(name, []).append(cell)
    return found


def calls(code: str, function: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == function]


@pytest.mark.parametrize("path", [*CHAPTERS, NBS / "python_primer.ipynb"], ids=lambda p: p.stem)
def test_exercises_are_whole(path):
    "At least five; each with a time, a stub, a check with hints, a line that runs it, a solution, and three wrong answers that it rejects."
    found = exercises(path)
    everything = found.pop(None)
    names = [name for name in found if re.match(r"\d+\. ", name)]
    assert [int(name.split(".")[0]) for name in names] == list(range(1, len(names) + 1)) and len(names) >= 5
    rejected = {call.args[0].id: len(call.args) - 1 for cell in everything if source(cell).startswith("#| hide")
                for call in calls(source(cell), "must_reject")}
    kinds = set()
    for name in names:
        task, *code = [source(cell) for cell in found[name]]
        time_and_kind = re.search(r"### " + re.escape(name) + r"\n\n\*(\d+ minutes|An evening) · ([^*]+)\.\* ", task)
        assert time_and_kind, f"{name}: when and how, in italics"
        kinds.add(time_and_kind.group(2))
        (check,) = [c for c in code if c.startswith("#| code-summary: Check\n#| code-fold: true\n")]
        (function,) = [node for node in ast.parse(check).body if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")]
        (decorator,) = function.decorator_list
        assert decorator.func.id == "hints" and len(decorator.args) >= 2, name
        assert any(re.search(rf"try_answer\({function.name}, ", c) for c in code), name
        (solution,) = [c for c in code if c.startswith("#| code-summary: Solution\n#| code-fold: true\n")]
        assert re.search(rf"^{function.name}\(", solution, re.MULTILINE), f"{name}: the solution goes through the check"
        assert rejected.get(function.name, 0) >= 3, f"{name}: three wrong answers that are rejected"
    assert len(kinds) >= 3, kinds


# --- questionnaire


def test_forty_questions_have_answers_that_assert():
    cells = load(NBS / "questionnaire.ipynb")["cells"]
    numbers = []
    for cell, after in zip(cells, cells[1:]):
        question = re.match(r"\*\*(\d+)\.\*\* .+", source(cell)) if cell["cell_type"] == "markdown" else None
        if not question: continue
        numbers.append(int(question.group(1)))
        assert after["cell_type"] == "code" and re.match(r"#\| code-summary: (Answer|Proof)\n#\| code-fold: true\n", source(after)), question.group()
        assert not after["outputs"], "an answer's output would give it away"
        tree = ast.parse(source(after))
        asserted = any(isinstance(node, ast.Assert) for node in ast.walk(tree))
        assert asserted or any(calls(source(after), f) for f in ("assert_close", "ExceptionExpected")), question.group()
        assert "<summary>Answer</summary>" in source(cell) and re.search(r"\]\(0[0-5]_\w+\.ipynb#", source(cell)), "a link to where it's taught"
    assert numbers == list(range(1, 41))
    projects = headings(NBS / "questionnaire.ipynb")
    projects = projects[projects.index("Four projects") + 1 :]
    assert len(projects) == 5


# --- glossary


def paragraphs(path) -> list[tuple[str, str]]:
    """The prose of a notebook: (id of the section, text). The introduction has the id ""; it announces, as do the last two sections."""
    found, section = [], ""
    for number, cell in enumerate(load(path)["cells"][1:]):
        if cell["cell_type"] != "markdown":
            found += [(section or "start", caption) for caption in re.findall(r'^#\| fig-cap: "(.*)"$', source(cell), re.MULTILINE)]
            continue
        text = re.sub(r"^```.*?^```", "", source(cell), flags=re.DOTALL | re.MULTILINE)
        text = re.sub(r"\$\$.*?\$\$|\$[^$\n]*\$", "", text, flags=re.DOTALL)
        text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"``.+?``|`[^`]*`", "", text))
        for paragraph in re.split(r"\n\s*\n|\n(?=- |\d\. |\|)", text):
            lines = paragraph.splitlines()
            for line in lines:
                if number and (heading := re.match(r"#+ (.*)", line)): section = anchor_of(heading.group(1))
            prose = "\n".join(line for line in lines if not re.match(r"#+ ", line)).strip()
            if prose: found.append((section, prose))
    return [(section, text) for section, text in found if section not in ("What-you-have-built", "What-comes-next")]


def pattern(term: str) -> re.Pattern:
    "A term in the singular or the plural; its case counts if it has a capital letter."
    words = re.escape(term).replace(r"\ ", "[ -]")
    return re.compile(rf"(?<![\w-]){words}{'(s|d)?' if term.endswith('e') else '(e?s)?'}(?![\w-])", 0 if term != term.lower() else re.IGNORECASE)


def entries() -> list[tuple[list[str], list[tuple[str, str]]]]:
    "(the names of a term, the notebooks and sections that explain it) for each line of the glossary."
    text = "\n".join(source(cell) for cell in load(NBS / "glossary.ipynb")["cells"])
    return [(re.findall(r"\*\*(.+?)\*\*", names), [(notebook, unquote(section)) for notebook, section in re.findall(r"\]\((\w+\.ipynb)#?([^)]*)\)", links)])
            for names, links in re.findall(r"^- (\*\*.+?): .+? → (.+)$", text, re.MULTILINE)]


def test_glossary_is_in_order():
    first = [names[0].lower() for names, _ in entries()]
    assert first == sorted(first) and len(first) > 120
    text = source(load(NBS / "glossary.ipynb")["cells"][-1])
    for names, links in entries(): assert re.search(rf"{links[0][0]}\): .*\b{re.escape(names[0])}\b", text), f"{names[0]} isn't among its chapter's terms"


def test_every_term_is_explained_at_or_before_its_first_use():
    "Explained: set in italics or bold in a section that the glossary names. An introduction may announce what is coming."
    chapters = [(path.name, *p) for path in CHAPTERS for p in paragraphs(path)]
    for names, links in entries():
        book = chapters if links[0][0][:2].isdigit() else [(links[0][0], *p) for p in paragraphs(NBS / links[0][0])]
        for name in names:
            word = pattern(name)
            explained = [i for i, (notebook, section, text) in enumerate(book) if (notebook, section) in links
                         and any(word.search(emphasised) for emphasised in re.findall(r"\*{1,2}([^*]+)\*{1,2}", text))]
            assert explained, f"{name} isn't explained in {links}"
            early = [entry for entry in book[: explained[0]] if entry[1] and word.search(entry[2])] if book is chapters else []
            assert not early, f"{name} is used before it's explained: {early[0]}"


def test_the_glossary_test_has_teeth():
    assert pattern("batch").search("two batches") and not pattern("batch").search("minibatch")
    assert pattern("L1").search("L1 pulls") and not pattern("L1").search("l1") and pattern("fan-in").search("Fan-in")
    terms = [name for names, _ in entries() for name in names]
    assert {"broadcasting", "gradient", "cross-entropy", "overfitting", "momentum", "receptive field"} <= set(terms)


# --- from ours to PyTorch


def test_every_public_name_is_beside_pytorchs():
    "The notebook itself fails for a name that it doesn't know; here the tables that it stores are held in step with the package."
    shown = "".join("".join(output.get("data", {}).get("text/markdown", "")) for cell in code_cells(NBS / "from_ours_to_pytorch.ipynb") for output in cell["outputs"])
    for path in sorted((ROOT / "fromfound").glob("[a-z]*.py")):
        names = re.search(r"^__all__ = \[(.*?)\]", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL).group(1)
        for name in re.findall(r"'(\w+)'", names): assert f"[`{name}`](" in shown, f"{path.stem}.{name}"


def test_chapters_lead_to_the_side_pages():
    text = "".join(source(cell) for path in CHAPTERS for cell in load(path)["cells"] if cell["cell_type"] == "markdown")
    for page in ("python_primer", "exercises", "questionnaire", "glossary", "from_ours_to_pytorch"): assert f"]({page}.ipynb" in text, page
