"""Calibration pools: tokens of each source, with the losses and states of the dense model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int64
from torch import Tensor

from secateur.pruners.calibration.tokens import begin
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.runner import BlockRunner
from secateur.pruners.stores.block_files import load_tensors, save_tensors
from secateur.spaces.recipe.keys import CHUNK

_BATCH_CHUNKS = 32
"""Chunks in one forward pass, with their logits in memory."""


@dataclass(frozen=True)
class Pool:
    """Tokens of one source.

    Chunks are read without the text before them, as windows are: the losses of their first tokens are high, alike for
    all chunks.

    Args:
        tokens: ids of consecutive tokens of the text.
        nll: of each whole chunk, the dense model's mean loss of its next tokens, in nats; None if not looked at.
        states: of each whole chunk, the mean over its tokens of the head's input; None if not looked at.
    """

    tokens: Int64[Tensor, " tokens"]
    nll: Float32[Tensor, " chunks"] | None = None
    states: Float32[Tensor, "chunks width"] | None = None


def build_pools(
    anatomy: Anatomy,
    tokens: Mapping[str, Int64[Tensor, " tokens"]],
    *,
    look: bool,
    on_share: Callable[[float], None] = lambda share: None,
) -> dict[str, Pool]:
    """The pool of each source.

    Args:
        look: run the model over them once, for choices by loss and by clusters.
        on_share: told the share of all tokens that is done, after each batch of chunks.
    """
    if not look:
        return {name: Pool(ids) for name, ids in tokens.items()}
    n_all = sum(len(ids) // CHUNK for ids in tokens.values())
    n_done = 0

    def on_chunks(n: int) -> None:
        nonlocal n_done
        n_done += n
        on_share(n_done / n_all)

    return {name: _look(anatomy, ids, on_chunks) for name, ids in tokens.items()}


def pool_bytes(anatomy: Anatomy, n_tokens: int, *, look: bool) -> int:
    """Bytes of the tensors of pools of so many tokens; the model may be without memory."""
    return 8 * n_tokens + (4 * (1 + anatomy.width) * (n_tokens // CHUNK) if look else 0)


@torch.no_grad()
def _look(anatomy: Anatomy, tokens: Int64[Tensor, " tokens"], on_chunks: Callable[[int], None]) -> Pool:
    runner = BlockRunner(anatomy)
    losses, states = [torch.empty(0)], [torch.empty(0, anatomy.width)]
    chunks = begin(tokens[: len(tokens) // CHUNK * CHUNK].view(-1, CHUNK), anatomy.bos)
    first = anatomy.first_scored
    for part in chunks.split(_BATCH_CHUNKS) if len(chunks) else ():
        read = anatomy.tail(runner.run(runner.start(part)))
        logits = anatomy.logits(read)[:, first:-1].float()
        nll = F.cross_entropy(
            logits.transpose(1, 2), part[:, first + 1 :].to(logits.device), reduction="none"
        )
        losses.append(nll.mean(1).cpu())
        states.append(read[:, first:].float().mean(1).cpu())
        on_chunks(len(part))
    return Pool(tokens, torch.cat(losses), torch.cat(states))


def pool_identity(
    model: str, texts: Mapping[str, str], n_tokens: int, *, look: bool, bos: int | None = None
) -> str:
    """Hash of all that pools depend on.

    Args:
        model: its fingerprint and precision, in one text.
        texts: hashes of the sources' texts, by name.
        n_tokens: of each source, at most.
        look: see `build_pools`.
        bos: token that chunks begin with.
    """
    record = {"model": model, "texts": dict(texts), "tokens": n_tokens, "look": look, "chunk": CHUNK}
    if bos is not None:
        record["bos"] = bos
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def save_pools(path: Path, pools: Mapping[str, Pool], identity: str) -> None:
    """Write the pools into one file, see `save_tensors`."""
    tensors = {
        f"{field}.{name}": tensor
        for name, pool in pools.items()
        for field, tensor in vars(pool).items()
        if tensor is not None
    }
    save_tensors(path, tensors, identity)


def load_pools(path: Path, identity: str | None = None) -> dict[str, Pool] | None:
    """Saved pools, mapped; None if there are none, or only under another identity.

    Args:
        identity: that it must have been written under; None: any.
    """
    tensors = load_tensors(path, identity)
    if tensors is None:
        return None
    by_source: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        field, _, name = key.partition(".")
        by_source.setdefault(name, {})[field] = tensor
    return {name: Pool(**fields) for name, fields in by_source.items()}
