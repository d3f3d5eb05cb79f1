"""Builds the package. Everything that can change stands in settings.ini; this file only reads it."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
config = ConfigParser()
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

# PyPI shows README.md without the files beside it, so links to them become whole addresses there.
branch = f"{cfg['user']}/{cfg['repo']}/{cfg['branch']}"
readme = (here / "README.md").read_text(encoding="utf-8")
readme = re.sub(r'(src="|!\[[^\]]*\]\()(?!https?:|#)', rf"\1https://raw.githubusercontent.com/{branch}/", readme)
readme = re.sub(r'(href="|\]\()(?!https?:|#)', rf"\1{cfg['git_url']}/blob/{cfg['branch']}/", readme)

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    packages=[cfg["lib_name"]],
    package_data={cfg["lib_name"]: ["py.typed", "digits.csv.gz", "digits.LICENSE"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={"nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},  # so that the site links names in backticks
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Education",
        "Programming Language :: Python :: 3",
        "Typing :: Typed",
    ],
    zip_safe=False,
)
