"""The site's files: what nbdev and Quarto share, the reading order, and no page that asks another host."""
import re
import subprocess
import sys

import pytest
from conftest import NOTEBOOKS, ROOT
from test_notebooks import ORDER

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
    listed = entries(read("nbs/sidebar.yml")["website"]["sidebar"]["contents"])
    assert listed == [f"{name}.ipynb" for name in ["index", *ORDER]]
    assert set(listed) == {p.name for p in NOTEBOOKS}, "a notebook is missing from the sidebar"


def test_light_dark_mathml_and_no_foreign_host():
    html = read("_quarto.yml")["format"]["html"]
    assert html["theme"] == {"light": ["cosmo", "site.scss"], "dark": ["darkly", "site.scss"]}
    assert html["html-math-method"] == "mathml" and html["respect-user-color-scheme"] is True
    scss = (ROOT / "nbs" / "site.scss").read_text()
    assert "$web-font-path: false;" in scss and "url(" not in scss and "@import" not in scss
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
