"""A model on the Hugging Face hub, pinned to one commit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from secateur.pruners.models.checkpoints.checkpoint import Checkpoint, ModelError
from secateur.pruners.models.checkpoints.directory import CONFIG, WEIGHTS, weight_files
from secateur.spaces.no_answer import NoAnswerError

TIMEOUT_S = 5.0


class HubUnreachableError(ModelError, NoAnswerError):
    """Model on a hub that does not answer, and not in the hub's cache."""


def open_hub(repo: str) -> Checkpoint:
    """The newest commit of a hub id; where the hub isn't reachable, the one in the local hub cache.

    Raises:
        ModelError: if there is no such model, or the user forbids the use of the hub and the model isn't cached.
        HubUnreachableError: if the hub isn't reachable and the model isn't cached.
    """
    commit = latest_commit(repo) or _cached_commit(repo)
    if commit is None:
        reason = "HF_HUB_OFFLINE is set" if is_offline() else "the hub is not reachable"
        raise (ModelError if is_offline() else HubUnreachableError)(
            f"Expected a model from the hub for {repo!r}, but {reason} and it is not in the hub's cache. "
            f"Go online, or name a local directory or an embedded model."
        )
    return Checkpoint(repo, f"hub {repo}@{commit}", lambda: commit, revision=commit)


def fetched(repo: str, commit: str) -> Path | None:
    """Directory with the config and the safetensors of a commit, from the hub or its cache; None if it has none.

    They are the files that transformers takes, so that they can be checked before it builds a model.

    Raises:
        ModelError: if the index names shards that are no plain file names.
    """
    get = partial(hub_file, repo, revision=commit)
    config = get(CONFIG)
    if config is None:
        return None
    if get(WEIGHTS[0]) is not None:
        return config.parent
    index = get(WEIGHTS[1])
    whole = index is not None and all(get(path.name) is not None for path in weight_files(config.parent))
    return config.parent if whole else None


def hub_file(repo: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a model, from the hub or its cache; None if neither has it, or it can't be reached."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name, revision=revision, local_files_only=is_offline()))
    except (EntryNotFoundError, OSError, ValueError):  # transformers says what is wrong
        return None


def is_offline() -> bool:
    """True if the user forbids the use of the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def latest_commit(repo: str) -> str | None:
    """The newest commit of a hub id, or None within seconds if the hub may not or cannot be reached.

    Raises:
        ModelError: if the hub answers that there is no such model.
    """
    if is_offline():
        return None
    from huggingface_hub import HfApi

    # HTTPError is that of the hub's HTTP library: httpx, or httpx2 since version 2.
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError  # type: ignore[attr-defined]

    try:
        return HfApi().model_info(repo, timeout=TIMEOUT_S).sha
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"Expected a model on the hub, got {repo!r}, which is not there (or private: log in with `hf auth login`)."
        ) from error
    except (HTTPError, OSError):
        return None


def _cached_commit(repo: str) -> str | None:
    """The commit of a model in the local hub cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json")
    return Path(config).parent.name if isinstance(config, str) else None  # …/snapshots/<commit>/config.json
