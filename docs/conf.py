"""Configuration of the documentation's site; `scripts/site` builds it."""

import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import generate  # noqa: E402  # lies beside this file

generate.write(HERE / "reference")

about = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
project = author = "Secateur"
version = release = about["version"]
copyright = "its authors"  # Sphinx's name

extensions = ["myst_nb"]
nb_execution_mode = "off"  # notebooks keep the outputs of a run; a test runs them
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "reference/methods.md", "reference/matrix.md"]  # parts of other pages
html_theme = "furo"
html_title = f"Secateur {version}"
html_static_path = []
html_show_sourcelink = False
html_copy_source = False
