"""The package is what the notebooks export, and the notebooks are clean."""
import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.committed


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "A copy of what nbdev reads and writes, in which its two commands may run."
    copy = tmp_path_factory.mktemp("copy")
    for name in ["nbs", "fromfound"]:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", copy)
    return copy


def run(command: str, cwd: Path):
    env = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([str(Path(sys.executable).parent / command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def same_files(a: Path, b: Path, pattern: str):
    names = {p.name for p in [*a.glob(pattern), *b.glob(pattern)]}
    assert names
    _, differing, missing = filecmp.cmpfiles(a, b, names, shallow=False)
    assert not differing + missing, f"run `make export`: {sorted(differing + missing)}"


def test_modules_are_what_the_notebooks_export(copy):
    for generated in (copy / "fromfound").glob("*.py"):
        if generated.name != "__init__.py":
            generated.unlink()
    run("nbdev_export", copy)
    same_files(ROOT / "fromfound", copy / "fromfound", "*.py")


def test_notebooks_are_clean(copy):
    run("nbdev_clean", copy)
    same_files(ROOT / "nbs", copy / "nbs", "*.ipynb")


def test_init_holds_the_version_only():
    assert (ROOT / "fromfound" / "__init__.py").read_text().strip().splitlines()[0].startswith("__version__ = ")
    assert len((ROOT / "fromfound" / "__init__.py").read_text().strip().splitlines()) == 1
