"""What the tests share: the repository's root and its notebooks."""
import json
from pathlib import Path

import matplotlib
import pytest
from hypothesis import settings

matplotlib.use("Agg")
# The same examples in every run, so that a reader's `make test` isn't a matter of luck; `--hypothesis-profile=default` draws new ones.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb"))
# The reading order: what comes before the chapters, then the chapters by number.
BEFORE = ["plots", "exercises", "python_primer", "data"]


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in load(path)["cells"] if cell["cell_type"] == "code"]


def pytest_configure(config):
    config.addinivalue_line("markers", "committed: what must hold before a commit, and may not while somebody reads and tries out")
    config.addinivalue_line("markers", "network: needs the network")


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem)
def notebook(request) -> Path:
    return request.param
