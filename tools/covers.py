"""Write the cover figures, those labelled fig-cover-…, to nbs/images/covers/: the README's pictures.

Run by `make readme`; tests/test_readme.py holds the files in step with the notebooks' stored outputs.
"""
import base64
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COVERS = ROOT / "nbs" / "images" / "covers"


def covers() -> dict[str, bytes]:
    """The PNG of each cover figure: a chapter's by the notebook's name, the home page's by their labels."""
    found = {}
    for path in [ROOT / "nbs" / "index.ipynb", *sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))]:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            label = re.search(r"^#\|\s*label:\s*fig-cover-(\w+)", "".join(cell["source"]), re.MULTILINE)
            for output in cell["outputs"] if label else []:
                if "image/png" in output.get("data", {}):
                    name = label.group(1) if path.stem == "index" else path.stem
                    found[name] = base64.b64decode("".join(output["data"]["image/png"]))
    return found


if __name__ == "__main__":
    COVERS.mkdir(parents=True, exist_ok=True)
    for name, png in covers().items():
        (COVERS / f"{name}.png").write_bytes(png)
        print(f"wrote nbs/images/covers/{name}.png")
