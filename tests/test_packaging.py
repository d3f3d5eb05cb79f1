"""The wheel and the sdist are built; the wheel is installed into a clean environment, and a net is trained there."""
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def settings():
    config = ConfigParser()
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    "A folder with the sdist, and with the wheel that was built from the sdist."
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture
def clean_env(tmp_path):
    "A new virtual environment, removed afterwards: with PyTorch in it, it's large."
    venv.create(tmp_path / "clean", with_pip=True)
    yield tmp_path / "clean"
    shutil.rmtree(tmp_path / "clean")


@pytest.mark.network
def test_wheel_holds_the_package_and_nothing_else(dist, settings):
    names = zipfile.ZipFile(next(dist.glob("*.whl"))).namelist()
    package = {n for n in names if ".dist-info/" not in n}
    here = {f"fromfound/{p.name}" for p in (ROOT / "fromfound").iterdir() if p.is_file()}
    assert package == here
    assert {"fromfound/py.typed", "fromfound/digits.csv.gz", "fromfound/digits.LICENSE"} <= package
    assert any(n.endswith("LICENSE") and ".dist-info/" in n for n in names)


@pytest.mark.network
def test_wheel_says_what_settings_say(dist, settings):
    wheel = zipfile.ZipFile(next(dist.glob("*.whl")))
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    assert f"Version: {settings['version']}\n" in metadata
    assert f"Requires-Python: >={settings['min_python']}\n" in metadata
    required = re.findall(r"^Requires-Dist: (\S+?)[><=~!; ]\S*(.*)$", metadata, re.MULTILINE)
    assert {name for name, marker in required if "extra" not in marker} == {"torch", "matplotlib", "fastcore", "tqdm"}
    assert not re.search(r"^Requires-Dist: torch.*(<|==)", metadata, re.MULTILINE), "torch has a lower bound only"


@pytest.mark.network
def test_sdist_builds_alone_and_brings_its_tests(dist, tmp_path):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist: sdist.extractall(tmp_path)
    (folder,) = tmp_path.iterdir()
    here = {f"tests/{p.name}" for p in (ROOT / "tests").glob("*.py")}
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {"settings.ini", "setup.py", "LICENSE", "README.md", "fromfound/digits.csv.gz"} | here <= names
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not committed and not network", "tests/test_matmul.py", "tests/test_plots.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(folder)})
    assert done.returncode == 0, done.stdout


@pytest.mark.network
def test_the_long_description_stands_alone(dist):
    "On PyPI, README.md is read far from the files that it shows: each link and picture is a whole address."
    wheel = zipfile.ZipFile(next(dist.glob("*.whl")))
    text = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    targets = re.findall(r"(?:\]\(|src=\"|href=\")([^)\"#]+)", text)
    assert len(targets) > 30 and all(t.startswith("https://") for t in targets), [t for t in targets if not t.startswith("https://")]
    root = "https://raw.githubusercontent.com/fromfound/fromfound/main/", "https://github.com/fromfound/fromfound/blob/main/"
    files = [t.removeprefix(r) for t in targets for r in root if t.startswith(r)]
    assert files and all((ROOT / f).is_file() for f in files), files


def test_setup_does_not_import_pkg_resources():
    assert "pkg_resources" not in (ROOT / "setup.py").read_text()


TRAIN = """
import importlib.metadata as md, importlib.util as util, pkgutil, sys
import torch, fromfound
assert util.find_spec("nbdev") is None and util.find_spec("IPython") is None
for module in pkgutil.iter_modules(fromfound.__path__):
    if not module.name.startswith("_"): __import__(f"fromfound.{module.name}")
from fromfound.data import digits
from fromfound.forward import accuracy
from fromfound.layers import CrossEntropyLoss, Linear, Model, ReLU, Sequential
torch.manual_seed(0)
d = digits()
model = Model(Sequential(Linear(64, 32), ReLU(), Linear(32, 10)), CrossEntropyLoss())
for step in range(300):
    model.zero_grad()
    model(d.x_train, d.y_train)
    model.backward()
    for p in model.parameters(): p -= 0.5 * p.g
print(fromfound.__file__, fromfound.__version__, md.version("fastcore"), accuracy(model.predict(d.x_valid), d.y_valid).item())
"""


@pytest.mark.network
def test_installed_in_a_clean_environment_it_trains(dist, settings, clean_env, tmp_path):
    python = clean_env / ("Scripts" if os.name == "nt" else "bin") / "python"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    wheel = next(dist.glob("*.whl"))
    # fastcore is asked for by name with no bound of ours: the newest there is.
    install = subprocess.run([*pip, "--upgrade", "-c", str(ROOT / "constraints.txt"), str(wheel), "fastcore"], env=env,
                             capture_output=True, text=True)
    assert install.returncode == 0, install.stderr
    done = subprocess.run([str(python), "-W", "error::DeprecationWarning:fromfound", "-c", TRAIN], env=env, cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, version, fastcore, acc = done.stdout.split()[-4:]
    assert str(clean_env) in file and version == settings["version"] and float(acc) > 0.9
    assert int(fastcore.split(".")[0]) >= 2, f"fastcore {fastcore} is not the newest"


def test_import_is_light():
    "Nothing that plotting or testing needs is loaded with the library's own modules."
    code = "import sys, fromfound.layers; print([m for m in ('matplotlib', 'fastcore', 'sympy.core', 'IPython') if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": ""}
    loaded = subprocess.run([sys.executable, "-c", "import sys, torch; before = set(sys.modules)\n" + code.replace(
        "if m in sys.modules", "if m in set(sys.modules) - before")], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
