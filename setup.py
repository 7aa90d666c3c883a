"""Packages, and what of the metadata depends on where the repository is published.

TOML can't both find packages in a folder and put `secateur.` before their names.
"""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ("search", "spaces", "pruners", "evaluators", "api")
HERE = Path(__file__).parent
REPOSITORY = tomllib.loads((HERE / "pyproject.toml").read_text("utf-8"))["tool"]["secateur"]["repository"]


def long_description() -> str:
    """README whose links and pictures lead to the repository, as a package index has no other files."""
    text = (HERE / "README.md").read_text("utf-8")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{REPOSITORY}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\1{REPOSITORY}/blob/main/", text)


setup(
    packages=[
        "secateur",
        *(
            f"secateur.{name}"
            for room in ROOMS
            for name in (room, *(f"{room}.{sub}" for sub in find_packages(room)))
        ),
        "secateur.examples",
    ],
    package_dir={"secateur": "package", **{f"secateur.{room}": room for room in (*ROOMS, "examples")}},
    long_description=long_description(),
    long_description_content_type="text/markdown",
    project_urls={
        "Repository": REPOSITORY,
        "Documentation": f"{REPOSITORY}/tree/main/docs",
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    },
)
