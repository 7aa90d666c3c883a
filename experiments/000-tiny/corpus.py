"""Make the training text of `tiny` from Debian's documentation packages; one JSON line per document.

    python corpus.py OUT.jsonl

Each line holds `source` (a package, `man` or `docstrings`) and `text`. HTML is written the way Sphinx's text
builder would write it. Paragraphs that share 8 words in a row with CPython's language reference (the
`docs` test text, `pydoc_data.topics`) are dropped, and so are repeated long paragraphs; OUT.counts.json says
how many.
"""

import ast
import json
import random
import re
import subprocess
import sys
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from pydoc_data.topics import topics
from typing import ClassVar

NGRAM = 8  # words in a row that count as contamination
PYTHON_DOCS = "python3.11-doc"
PACKAGES = [
    PYTHON_DOCS,
    *(
        f"python-{name}-doc"
        for name in (
            "attr",
            "cffi",
            "click",
            "django",
            "future",
            "gevent",
            "hypothesis",
            "ipython",
            "jinja2",
            "lark",
            "pyparsing",
            "pytest",
            "setuptools",
            "sqlalchemy",
            "toolz",
            "tornado",
            "traitlets",
            "wrapt",
        )
    ),
    "cython-doc",
    "debian-policy",
    "debian-reference-en",
    "developers-reference",
]
# The test text itself (reference/), and pages which are lists of names or raw source.
EXCLUDED = re.compile(
    r"/reference/|genindex|py-modindex|/search\.html|/_modules/|/_static/|changelog|contents\.html"
    r"|/django/.*releases/|/python3\.11/html/index\.html|\.(?!en)[a-z]{2}(_[A-Z]{2})?\.html$"
)
N_MAN_PAGES = 300


class PlainText(HTMLParser):
    """Text of one HTML page as Sphinx's text builder sets it: 70 columns, quoted code, underlined titles."""

    BLOCKS = frozenset(
        {
            "p",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
            "li",
            "dt",
            "dd",
            "pre",
            "tr",
            "div",
            "ul",
            "ol",
            "dl",
            "table",
            "blockquote",
            "section",
        }
    )
    MARKS: ClassVar = {"code": '"', "tt": '"', "em": "*", "i": "*", "strong": "**", "b": "**"}
    SKIPPED_TAGS = frozenset({"script", "style", "head", "nav", "footer", "form"})
    SKIPPED_CLASSES = frozenset(
        {
            "headerlink",
            "sphinxsidebar",
            "related",
            "footer",
            "toctree-wrapper",
            "viewcode-link",
            "navheader",
            "navfooter",
            "toc",
            "linenos",
        }
    )
    INDENTS: ClassVar = {"dd": 3, "blockquote": 3, "li": 2}

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self.buffer: list[str] = []
        self.indent, self.bullet, self.quiet, self.pre, self.cells = 0, False, 0, 0, 0
        self.skipped, self.depth = "", 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipped:
            self.depth += tag == self.skipped
            return
        classes = set((dict(attrs).get("class") or "").split())
        if tag in self.SKIPPED_TAGS or classes & self.SKIPPED_CLASSES:
            self.skipped, self.depth = tag, 1
            return
        if tag in self.BLOCKS and not self.cells:
            self.flush()
        self.cells += tag in ("td", "th")
        self.indent += self.INDENTS.get(tag, 0)
        self.bullet = tag == "li" or (self.bullet and tag == "p")
        self.quiet += tag in ("dt", "pre")
        self.pre += tag == "pre"
        self.mark(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.skipped:
            self.depth -= tag == self.skipped
            if not self.depth:
                self.skipped = ""
            return
        self.mark(tag)
        if tag in ("td", "th"):
            self.buffer.append("   ")
            self.cells = max(0, self.cells - 1)
        if tag in self.BLOCKS and not self.cells:
            self.flush(underline={"h1": "*", "h2": "=", "h3": "-", "h4": "~"}.get(tag, ""))
        self.indent = max(0, self.indent - self.INDENTS.get(tag, 0))
        self.quiet = max(0, self.quiet - (tag in ("dt", "pre")))
        self.pre = max(0, self.pre - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.buffer.append(data)

    def mark(self, tag: str) -> None:
        """Append the inline mark of `tag`, outside signatures and code blocks."""
        if tag in self.MARKS and not self.quiet:
            self.buffer.append(self.MARKS[tag])

    def flush(self, underline: str = "") -> None:
        """Close the current paragraph."""
        text, self.buffer = "".join(self.buffer), []
        if not text.strip():
            return
        if self.pre:
            text = textwrap.indent(text.strip("\n"), " " * (self.indent + 3))
        else:
            text, left = re.sub(r"\s*\n\s*", " ", text).strip(), " " * self.indent
            first = left[:-2] + "* " if self.bullet and self.indent >= 2 else left
            if underline:
                text = f"{text}\n{underline * len(text)}"
            else:
                text = textwrap.fill(
                    text,
                    70,
                    initial_indent=first,
                    subsequent_indent=left,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
        self.bullet = False
        self.paragraphs.append(text)


def html_pages(package: str) -> Iterator[list[str]]:
    """Paragraphs of each English HTML page that an installed Debian package holds."""
    listed = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=True).stdout
    for name in sorted(listed.split("\n")):
        if name.endswith(".html") and not EXCLUDED.search(name) and Path(name).is_file():
            page = PlainText()
            page.feed(Path(name).read_text(encoding="utf-8", errors="replace"))
            page.flush()
            yield page.paragraphs


def man_pages(seed: int) -> Iterator[list[str]]:
    """Paragraphs of a seeded sample of the English manual pages in sections 2, 3 and 7, rendered by `man`."""
    names = sorted(
        str(path) for section in "237" for path in Path(f"/usr/share/man/man{section}").glob("*.gz")
    )
    for name in sorted(random.Random(seed).sample(names, min(N_MAN_PAGES, len(names)))):
        shown = subprocess.run(
            f"MANWIDTH=78 man -Tutf8 {name} 2>/dev/null | col -b",
            shell=True,
            capture_output=True,
            check=False,
        ).stdout
        yield re.split(r"\n\s*\n", shown.decode("utf-8", errors="replace").strip("\n"))


def docstrings() -> Iterator[list[str]]:
    """Docstrings of each standard library module, without tests and without the test text's own package."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if re.search(r"/(site-packages|dist-packages|test|tests|idlelib|pydoc_data|lib2to3)/", str(path)):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        yield [part for text in found if text for part in re.split(r"\n\s*\n", text)]


def ngrams(text: str) -> set[tuple[str, ...]]:
    """All runs of NGRAM lower-cased words of `text`, punctuation stripped."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def main(out: str) -> None:
    """Write the documents and the counts of what was kept and dropped (characters)."""
    forbidden = set().union(*map(ngrams, topics.values()))
    sources = {name: html_pages(name) for name in PACKAGES} | {
        "docstrings": docstrings(),
        "man": man_pages(seed=0),
    }
    seen: set[str] = set()
    counts: dict[str, Counter[str]] = {}
    with Path(out).open("w", encoding="utf-8") as file:
        for source, documents in sources.items():
            count = counts.setdefault(source, Counter())
            for paragraphs in documents:
                kept = []
                for text in paragraphs:
                    repeated = len(text) > 60 and text in seen
                    seen.add(text)
                    fate = "repeated" if repeated else "contaminated" if ngrams(text) & forbidden else "kept"
                    count[fate + "_chars"] += len(text)
                    count[fate + "_paragraphs"] += 1
                    if fate == "kept":
                        kept.append(text)
                if sum(map(len, kept)) > 200:
                    file.write(json.dumps({"source": source, "text": "\n\n".join(kept) + "\n"}) + "\n")
            print(source, dict(count), flush=True)
    Path(out).with_suffix(".counts.json").write_text(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
