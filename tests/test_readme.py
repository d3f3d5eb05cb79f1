"""README.md is index.ipynb, its example prints what is printed, its pictures are the chapters' own figures."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NOTEBOOKS, ROOT

sys.path.insert(0, str(ROOT / "tools"))
from covers import COVERS, covers  # noqa: E402

pytestmark = pytest.mark.committed

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_made_from_the_index(tmp_path):
    command = ["-m", "jupyter", "nbconvert", "--log-level=WARN", "--config", "tools/readme_config.py", "--to", "markdown",
               "nbs/index.ipynb", "--output-dir", str(tmp_path), "--output", "README"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README, "run `make readme`"


def test_pictures_are_the_chapters_own():
    stored = {p.stem: p.read_bytes() for p in COVERS.glob("*.png")}
    assert stored == covers(), "run `make readme`"
    assert set(stored) == {"index", "map", *(p.stem for p in NOTEBOOKS if re.match(r"\d\d_", p.stem))}, "every chapter has a cover figure"


def test_links_lead_somewhere():
    for target in re.findall(r"(?:\]\(|src=\"|href=\")([^)\"#]+)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_chapter_is_in_the_table():
    for path in NOTEBOOKS:
        if re.match(r"\d\d_", path.stem):
            assert f"nbs/{path.name}" in README and f"blob/main/nbs/{path.name}" in README


def test_the_first_two_commands():
    block = re.search(r"```(?:sh|bash)\n(.*?)```", README, re.DOTALL).group(1)
    commands = [line.split("#")[0].strip() for line in block.splitlines() if line.strip()]
    assert commands == ["make lab", "make test"]


def test_the_examples_print_what_is_printed(tmp_path):
    "Run together, since the second one goes on where the first one ends; only the times may differ."
    found = re.findall(r"```python\n(.*?)```\s*\n((?:    [^\n]*\n)+)", README, re.DOTALL)
    assert len(found) == 2, "two examples and their output"
    done = subprocess.run([sys.executable, "-c", "".join(example for example, _ in found)], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "MPLBACKEND": "agg"})
    assert done.returncode == 0, done.stderr

    def lines(text): return [re.sub(r"\d+\.\d+s$", "time", line.strip()) for line in text.splitlines() if line.strip()]
    assert lines(done.stdout) == lines("".join(output for _, output in found))
    assert (tmp_path / "digits.pt").exists()
