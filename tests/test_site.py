"""The documentation: it builds, and its commands, settings and programs are such as the page says.

A block of code on a page is one of: settings or a recipe, which are read; commands, which the command line's parser
reads; Python, which is run; JSON and text, which are no programs. Any other, or one that can not be run here, stands
behind a comment ``<!-- not run: REASON -->``.
"""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml

from secateur.search import cli
from secateur.search.app.recipe_file import read_recipe
from secateur.search.settings.settings import settings_from

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = {"options.md", "keys.md", "functions.md"}
PAGES = sorted(page for page in DOCS.rglob("*.md") if page.name not in GENERATED)
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\s*$")
READ_ONLY = {"json", "text", "{toctree}", "{include}"}


@dataclass(frozen=True)
class Block:
    """Block of code of a page."""

    page: Path
    line: int
    language: str
    text: str
    excuse: str | None

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Fenced blocks, and indented ones, which hold commands."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        before = text[: match.start()]
        excuse = NOT_RUN.search(before)
        language = match[1].split(" ")[0] if match[1].startswith("{") else match[1]
        line = before.count("\n") + 1
        found.append(Block(page, line, language, match[2], excuse[1] if excuse else None))
    prose = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    for match in re.finditer(r"(?:^\n)((?:    \S.*\n(?:     .*\n)*)+)", prose, re.MULTILINE):
        line = prose[: match.start()].count("\n") + 2
        excuse = NOT_RUN.search(prose[: match.start()])
        found.append(Block(page, line, "sh", match[1], excuse[1] if excuse else None))
    return found


BLOCKS = [block for page in [*PAGES, ROOT / "README.md"] for block in blocks_of(page)]


def of(*languages: str):
    return pytest.mark.parametrize(
        "block",
        [pytest.param(b, id=b.name) for b in BLOCKS if b.language in languages and b.excuse is None],
    )


def test_every_block_is_tested_or_excused():
    tested = {"yaml", "sh", "console", "python", *READ_ONLY}
    assert [b.name for b in BLOCKS if b.language not in tested and b.excuse is None] == []
    assert sum(b.excuse is not None for b in BLOCKS) <= 6


@of("yaml")
def test_settings_and_recipes_are_read(block, monkeypatch, tmp_path):
    monkeypatch.setenv("PGPASSWORD", "secret")
    raw = yaml.safe_load(block.text)
    if "recipe" in raw or "candidate" in raw:
        (tmp_path / "recipe.yaml").write_text(block.text)
        read_recipe(tmp_path / "recipe.yaml")
    else:
        settings_from(raw)


def lines_in(text: str) -> list[str]:
    """Commands of a block; lines that end in a backslash are joined, comments and prompts left out."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ") for line in lines]
    return [line for line in found if line]


PLACEHOLDERS = {"TRIAL": "7", "NUMBER": "7"}
OTHERS = ("pip", "python3", "source", "export", "ray")  # programs that are not ours


@of("sh", "console")
def test_commands_are_such_as_the_program_reads(block):
    """A synopsis, with brackets or bars, has known names of options alone; any other command is parsed as it stands."""
    known = typer.main.get_command(cli._app()).commands
    for line in lines_in(block.text):
        is_synopsis = re.search(r"[\[\]|·>]|\.\.\.", re.sub(r"'[^']*'|\"[^\"]*\"", "", line))
        program, *rest = line.split() if is_synopsis else shlex.split(line)
        if Path(program).name == "secateur":
            command = known[rest[0]]
            if is_synopsis:
                options = {option for parameter in command.params for option in parameter.opts}
                ours = line.split("·")[0]
                assert set(re.findall(r"(?<!\S|\[)\[?(--[\w-]+)", ours)) <= options, line
            else:
                arguments = [PLACEHOLDERS.get(word, word) for word in rest[1:]]
                command.make_context(f"secateur {rest[0]}", arguments)
        elif program.startswith("scripts/"):
            assert (ROOT / program).is_file(), program
        else:
            assert Path(program).name in OTHERS, line


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.page == page for b in BLOCKS if b.language == "python")]
)
def test_programs_run(page, tmp_path):
    """The blocks of a page one after the other, in a directory with the files that they read."""
    (tmp_path / "valid.jsonl").write_text('{"goal": "g", "sol1": "a", "sol2": "b"}\n')
    (tmp_path / "valid-labels.lst").write_text("1\n")
    code = "\n".join(b.text for b in BLOCKS if b.page == page and b.language == "python" and b.excuse is None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("book", sorted(DOCS.rglob("*.ipynb")), ids=lambda book: book.stem)
def test_notebooks_run_and_keep_their_outputs(book, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pages = nbformat.read(book, as_version=4)
    kept = [printed(cell) for cell in pages.cells]
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(pages, timeout=300, resources=resources).execute()
    run = [printed(cell) for cell in pages.cells]
    words = [[re.sub(r"[\d.]+", "#", text) for text in texts] for texts in (kept, run)]
    assert words[0] == words[1]  # numbers may differ between machines
    assert any(kept)


def printed(cell) -> str:
    """Text that a cell wrote to stdout."""
    found = [o for o in cell.get("outputs", []) if o.output_type == "stream" and o.name == "stdout"]
    return "".join(o.text for o in found)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("sphinx")
    place = tmp_path_factory.mktemp("site")
    options = ["--fail-on-warning", "--keep-going", "--quiet", "-b", "html", "-d", place / "doctrees"]
    command = [sys.executable, "-m", "sphinx", *options, DOCS, place / "html"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return place / "html"


def test_the_site_builds_without_a_warning(site):
    """Links to nowhere, pages outside of the menu and unknown directives are warnings."""
    pages = {str(page.relative_to(site)) for page in site.rglob("*.html")}
    assert {"index.html", "reference/options.html", "tutorial/notebook-search.html"} <= pages
    index = (site / "index.html").read_text(encoding="utf-8")
    for kind in ("Tutorials", "How to", "Reference", "Explanation"):
        assert f">{kind}</span>" in index


def test_the_reference_has_every_command_and_key(site):
    commands = (site / "reference" / "options.html").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(cli._app()).commands.items():
        assert f'id="{name}"' in commands
        assert all(option in commands for p in command.params for option in p.opts if option.startswith("--"))
    keys = (site / "reference" / "keys.html").read_text(encoding="utf-8")
    dumped = settings_from({}).model_dump(mode="json")
    for name in [*dumped, *dumped["space"], *dumped["controller"], *dumped["evaluator"], *dumped["budget"]]:
        assert (
            name in ("kind", "space", "controller", "executor") or f">{name}<" in keys or f"{name}: " in keys
        ), name


def test_the_site_needs_no_network(site):
    """No font, script or style comes from elsewhere."""
    for page in (site / "index.html", site / "reference" / "keys.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"', text)
        assert [a or b for a, b in loaded if re.match(r"(?:https?:)?//", a or b)] == []


def test_notebooks_hold_no_outputs_of_this_machine():
    for book in DOCS.rglob("*.ipynb"):
        text = json.dumps(json.loads(book.read_text(encoding="utf-8")))
        assert not re.search(r"/(?:tmp|home|root|work|Users)/", text)
