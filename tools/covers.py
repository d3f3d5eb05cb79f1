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
    """The PNG of the home page's and of each chapter's cover figure, by the notebook's name."""
    found = {}
    for path in [ROOT / "nbs" / "index.ipynb", *sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))]:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if not re.search(r"^#\|\s*label:\s*fig-cover-", "".join(cell["source"]), re.MULTILINE):
                continue
            for output in cell["outputs"]:
                if "image/png" in output.get("data", {}):
                    found[path.stem] = base64.b64decode("".join(output["data"]["image/png"]))
    return found


if __name__ == "__main__":
    COVERS.mkdir(parents=True, exist_ok=True)
    for name, png in covers().items():
        (COVERS / f"{name}.png").write_bytes(png)
        print(f"wrote nbs/images/covers/{name}.png")
