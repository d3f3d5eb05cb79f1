"""How `jupyter nbconvert` turns nbs/index.ipynb into README.md (see `make readme`)."""
import re

from nbconvert.preprocessors import Preprocessor


class Readme(Preprocessor):
    """Leaves out hidden cells and directives; points links and figures at files as seen from the root."""

    def preprocess(self, nb, resources):
        nb.metadata["language_info"] = {"name": "python"}  # nbdev_clean drops it; code blocks are labelled by it
        nb.cells = [cell for cell in nb.cells if not re.search(r"^#\|\s*hide\b", cell.source, re.MULTILINE)]
        for cell in nb.cells:
            if cell.cell_type == "code":
                for output in cell.outputs:  # the figure is a file already: tools/covers.py has written it
                    if "image/png" in output.get("data", {}):
                        alt, name = (re.search(key, cell.source).group(1) for key in (r'fig-alt: "(.*)"', r"label: fig-cover-(\w+)"))
                        output["data"] = {"text/markdown": f"![{alt}](nbs/images/covers/{name}.png)"}
                cell.metadata["transient"] = {"remove_source": "#| echo: false" in cell.source}
                cell.source = re.sub(r"^#\|.*\n", "", cell.source, flags=re.MULTILINE)
            else:
                cell.source = re.sub(r"(\]\(|src=\"|href=\")(?!https?:|#|\.\./)", r"\1nbs/", cell.source)
                cell.source = re.sub(r"(\]\(|src=\"|href=\")\.\./", r"\1", cell.source)
        resources["outputs"] = {}  # no other picture files beside it
        return nb, resources


c = get_config()  # noqa: F821  (traitlets puts get_config here)
c.MarkdownExporter.preprocessors = [Readme]
