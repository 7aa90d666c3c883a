"""Upload of an exported model to a hub, with its card, in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any

from secateur.pruners.export.card import CARD, HERE, card
from secateur.pruners.export.manifest import MANIFEST, Manifest, check_files, file_record, manifest_of
from secateur.pruners.models.checkpoints.checkpoint import one_line
from secateur.pruners.models.checkpoints.hub import TIMEOUT_S, is_offline
from secateur.spaces.no_answer import NoAnswerError
from secateur.spaces.plain_files import check_no_link

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf")


@dataclass(frozen=True)
class Upload:
    """An exported model as it goes to a hub.

    Args:
        directory: of the export, which stays as it is.
        repo: ``owner/name``.
        revision: branch; None: the main one.
        card: text of ``README.md``.
        manifest: text of ``secateur.json``, without paths of this machine.
        files: sizes in bytes by path, of all that is uploaded.
        left_out: further files of the directory, which are not uploaded.
        edited: the card was changed by hand after the export, and is kept but for the place to load from.
    """

    directory: Path
    repo: str
    revision: str | None
    card: str
    manifest: str
    files: Mapping[str, int]
    left_out: tuple[str, ...]
    edited: bool

    @property
    def code(self) -> tuple[str, ...]:
        """Files of code, which run where the model is loaded."""
        return tuple(name for name in self.files if name.endswith(".py"))


def prepared(directory: Path, repo: str, revision: str | None = None) -> Upload:
    """The upload of an export, with its files checked; nothing is sent.

    Args:
        directory: of the export.
        repo: ``owner/name``.
        revision: branch; None: the main one.

    Raises:
        ValueError: if the name is none of a repository, the directory holds no export, or a file is damaged.
    """
    check_name(repo)
    if check_files(directory, but=[CARD]) == 0:
        raise ValueError(
            f"Expected an export with checksums of its files, got {directory}, of an earlier version. Export again."
        )
    there = manifest_of(directory)
    assert there is not None  # `check_files` read it
    written = directory / CARD
    check_no_link(written)  # what is edited is not compared, and would be uploaded from anywhere
    edited = written.is_file() and file_record(written) != there.files.get(CARD)
    public = _public(there)
    if edited:
        text = written.read_text(encoding="utf-8").replace(HERE, repo)
    else:
        text = card(public, repo, revision)
    record = {"size_bytes": len(text.encode()), "sha256": sha256(text.encode()).hexdigest()}
    manifest = replace(public, files={**there.files, CARD: record}).to_json()
    own = {CARD: len(text.encode()), MANIFEST: len(manifest.encode())}
    files = {
        name: own.get(name) or (directory / name).stat().st_size for name in sorted({*there.files, *own})
    }
    found = (
        path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file()
    )
    left_out = tuple(name for name in found if name not in files)
    return Upload(directory, repo, revision, text, manifest, files, left_out, edited)


def upload(what: Upload, *, private: bool = False) -> str:
    """Upload in one commit, and give its address; the repository is made if it is missing.

    Weights in the repository that are not among the files are removed: they might be loaded in place of these.

    Args:
        what: from `prepared`.
        private: the repository is for its owner alone.

    Raises:
        ValueError: if the hub refuses, or the repository is public and should be private; nothing was uploaded then.
        NoAnswerError: if the hub does not answer.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]  # see `latest_commit`

    if is_offline():
        raise ValueError("Expected the hub to be allowed, but HF_HUB_OFFLINE is set. Unset it to upload.")
    api, own = HfApi(), {CARD: what.card.encode(), MANIFEST: what.manifest.encode()}
    try:
        api.create_repo(what.repo, private=private or None, exist_ok=True)
        if what.revision is not None:
            api.create_branch(what.repo, branch=what.revision, exist_ok=True)
        found = api.model_info(what.repo, revision=what.revision, timeout=TIMEOUT_S)
        if private and not found.private:
            raise ValueError(
                f"Expected a private repository, got {what.repo}, which is public. Name another."
            )
        held = [file.rfilename for file in found.siblings or ()]
        stale = [name for name in held if name not in what.files and name.endswith(WEIGHTS)]
        operations: list[CommitOperationAdd | CommitOperationDelete | CommitOperationCopy] = [
            *(CommitOperationAdd(name, own.get(name, what.directory / name)) for name in what.files),
            *(CommitOperationDelete(name) for name in stale),
        ]
        message = f"Upload {len(what.files)} files with Secateur"
        done = api.create_commit(what.repo, operations, commit_message=message, revision=what.revision)
    except (HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:
        # of a large file that does not arrive the library raises a RuntimeError
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        if isinstance(cause, HfHubHTTPError):
            raise _refused(cause, what.repo) from error
        raise NoAnswerError(f"Expected the hub to answer, got: {_reason(cause)}. Try again later.") from error
    return done.commit_url


def check_name(repo: str) -> None:
    """Raise a ValueError unless the name is ``owner/name``, as the hub has them."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented there

    try:
        validate_repo_id(repo)
    except HFValidationError:
        pass
    else:
        if repo.count("/") == 1:
            return
    raise ValueError(
        f"Expected a repository as owner/name, got {repo!r}. Name the owner, as in someone/tiny-pruned."
    )


def _public(manifest: Manifest) -> Manifest:
    """The manifest with the last parts of this machine's paths, of which a public file says nothing more."""
    is_on_disk = (
        manifest.revision is None and len(manifest.fingerprint) == 64
    )  # SHA-256; on the hub it is a commit
    calibration = dict(manifest.calibration)
    if "text" in calibration:
        calibration["text"] = _last_part(calibration["text"])
    if "sources" in calibration:  # of a recipe, by name
        calibration["sources"] = {name: _last_part(text) for name, text in calibration["sources"].items()}
    return replace(
        manifest,
        parent=PurePath(manifest.parent).name if is_on_disk else manifest.parent,
        calibration=calibration,
        texts={part: _last_part(text) for part, text in manifest.texts.items()},
    )


def _last_part(source: str) -> str:
    """Source of text, its path without folders; one of the hub as it is."""
    if source.startswith("hub:"):
        return source
    prefix = "text:" if source.startswith("text:") else ""
    return prefix + source.removeprefix(prefix).rpartition("/")[2]


def _refused(error: Any, repo: str) -> ValueError:
    """Error for the user from one of the hub's answers."""
    status, reason = error.response.status_code, _reason(error.server_message or error)
    if status in (401, 403):
        return ValueError(
            f"Expected the right to write {repo}, got: {reason}. Log in with `hf auth login`, or set HF_TOKEN to a "
            "token that may write."
        )
    if status == 429 or status >= 500:
        return NoAnswerError(f"Expected the hub to answer, got status {status}: {reason}. Try again later.")
    return ValueError(
        f"Expected the hub to take {repo}, got status {status}: {reason}. Correct the name or files."
    )


def _reason(error: Any) -> str:
    return one_line(str(error)) or type(error).__name__
