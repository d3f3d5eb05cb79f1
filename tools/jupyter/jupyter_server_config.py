"""What `make lab` tells Jupyter: clean notebooks as they are saved, and list only what readers open."""
from nbdev.clean import clean_jupyter


def clean(model: dict, **kwargs) -> None:
    "nbdev's cleaning; besides, the controls below a figure are dropped, which are of no use without a kernel. The figure stays."
    clean_jupyter(model=model, **kwargs)
    if model["type"] == "notebook":
        for cell in model["content"]["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = [o for o in cell["outputs"] if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]


c = get_config()  # noqa: F821  (traitlets puts get_config here)
c.ContentsManager.pre_save_hook = clean  # nbdev's part is switched on by jupyter_hooks in settings.ini
c.ContentsManager.hide_globs = ["__pycache__", "*.yml", "*.scss", "fonts", "images"]
