"""Upload of an exported model to a hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.session import Say, silent, usage_errors
from secateur.search.errors import UsageError
from secateur.search.study.about import ABOUT

if TYPE_CHECKING:
    from secateur.pruners.export.push import Upload


@dataclass(frozen=True)
class Pushed:
    """An upload, done or planned.

    Args:
        upload: what goes to the hub.
        private: the repository is for its owner alone.
        url: of the commit; None of a dry run.
    """

    upload: Upload
    private: bool
    url: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        of = self.upload
        return {
            "directory": str(of.directory),
            "repo": of.repo,
            "revision": of.revision,
            "private": self.private,
            "files": dict(of.files),
            "left_out": list(of.left_out),
            "code": list(of.code),
            "card": of.card,
            "uploaded": self.url is not None,
            "url": self.url,
        }


@usage_errors()
def push(
    source: Path,
    repo: str,
    *,
    upload: bool = False,
    private: bool = False,
    revision: str | None = None,
    say: Say = silent,
) -> Pushed:
    """Upload an exported model with its card to a hub, or show what would be uploaded.

    Args:
        source: directory of the model, or of a run, which stands for the newest model in it.
        repo: ``owner/name``; made if it is missing.
        upload: do it; False: a dry run, which sends nothing.
        private: make the repository one for its owner alone.
        revision: branch, made if it is missing; None: the main one.
        say: given progress and warnings, one line at a time.

    Raises:
        UsageError: if there is no export, a file of it is damaged, or the hub refuses.
        UnavailableError: if the hub does not answer.
    """
    from secateur.pruners.export import push as pushing

    what = pushing.prepared(_exported(source, say), repo, revision)
    if what.code:
        say(f"code comes along and runs where the model is loaded: {', '.join(what.code)}")
    if what.edited:
        say("the card was edited after the export, and goes as it is")
    if what.left_out:
        say(f"not of the export, and left out: {', '.join(what.left_out)}")
    if "\nlicense:" not in what.card:
        say(
            "no licence is known: write `license: NAME` into the head of README.md, as the parent's card has it"
        )
    if upload:
        say(f"uploading to {repo}")
    return Pushed(what, private, pushing.upload(what, private=private) if upload else None)


def _exported(source: Path, say: Say) -> Path:
    """The directory itself, or of a run the newest export in it.

    Raises:
        UsageError: if a run has none.
    """
    from secateur.pruners.export.manifest import MANIFEST

    if (source / MANIFEST).is_file() or not (source / ABOUT).is_file():
        return source
    found = sorted(source.rglob(MANIFEST), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UsageError(
            f"Expected an exported model in {source}, got none. Export one first: secateur export {source} TRIAL --to "
            f"{source / 'model'}, or name its directory."
        )
    newest = found[-1].parent
    others = ", ".join(str(path.parent) for path in found[:-1])
    say(f"the newest export of {source}: {newest}" + (f"; others: {others}" if others else ""))
    return newest
