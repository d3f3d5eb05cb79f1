"""What `make lab` tells Jupyter: clean notebooks as they are saved, and list only what readers open."""
from nbdev.clean import clean_jupyter

c = get_config()  # noqa: F821  (traitlets puts get_config here)
c.ContentsManager.pre_save_hook = clean_jupyter  # switched on by jupyter_hooks in settings.ini
c.ContentsManager.hide_globs = ["__pycache__", "*.yml", "*.scss", "fonts", "images"]
