"""Command for the hub: ``push``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from secateur.search.cli.option_groups import Json
from secateur.search.show.console import open_display, show, show_facts, show_json


def push(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN|DIR", help="Directory of an export, or of a run: the newest one in it."),
    ],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository; made if it is missing.")],
    upload: Annotated[
        bool,
        typer.Option("--upload", help="Upload; without it files and card are shown, and nothing is sent."),
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="A repository for its owner alone.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch, made if it is missing; default: main.")
    ] = None,
    json: Json = False,
) -> None:
    """Show what of an exported model would go to the Hugging Face hub, with its card; --upload sends it."""
    from secateur.search import app as rooms

    with open_display() as display:
        pushed = rooms.push(source, repo, upload=upload, private=private, revision=revision, say=display.note)
    if json:
        show_json(pushed.to_json())
        return
    of = pushed.upload
    show(
        f"uploaded to {repo}: {pushed.url}"
        if pushed.url
        else f"dry run, nothing is sent: {of.directory} to {repo}"
    )
    sizes = {name: f"{n_bytes:>15,} bytes" for name, n_bytes in of.files.items()}
    show_facts({**sizes, "in all": f"{sum(of.files.values()):>15,} bytes"})
    if not pushed.url:
        more = ["--private"] * private + (["--revision", revision] if revision else [])
        words = shlex.join(["secateur", "push", str(of.directory), repo, *more, "--upload"])
        show(f"\n{of.card}\nNext:  {words}")
