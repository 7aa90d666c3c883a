"""Bounds on the whole model as the target of a search."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from secateur.search.errors import UsageError
from secateur.search.results.pick import Bound
from secateur.search.settings.evaluator import LatencySettings
from secateur.search.settings.problems import problems
from secateur.search.settings.settings import Settings
from secateur.spaces.architecture.cost import ShareOf, block_shares, held_by_blocks
from secateur.spaces.latency import at_batch
from secateur.spaces.shape import ModelShape

QUANTITIES: Mapping[str, str] = {
    "max-params": "params",
    "max-size": "params",
    "max-latency": "latency_decode",
    "max-prefill": "latency_prefill",
    "max-macs": "macs",
    "max-kv": "kv_bytes",
}
"""Quantity of a target by the name of a bound; the size in bytes follows the parameters."""


def bounded(settings: Settings, texts: Mapping[str, str | None]) -> Settings:
    """The settings with a bound as the target of their space.

    Args:
        settings: of a search in a space that makes models smaller.
        texts: bounds by name, one of them not None: a share of the dense model such as ``0.7x``.

    Raises:
        UsageError: if it is none, or the space has no such target.
    """
    given = [Bound.parse(name, text) for name, text in texts.items() if text is not None]
    if not given:
        return settings
    if len(given) > 1 or not given[0].relative or not 0 < given[0].limit < 1:
        shown = " ".join(f"--{bound.name} {bound.text}" for bound in given)
        raise UsageError(f"Expected one limit as a share of the dense model, such as 0.7x, got {shown}.")
    bound, space = given[0], settings.space
    fields = type(space).model_fields
    if "share_of" not in fields:
        raise UsageError(
            f"Expected a space that makes models smaller with `--{bound.name}`, got {space.kind}. Set `space.kind` to "
            "architecture, masks or recipe."
        )
    if "of" not in fields and QUANTITIES[bound.name] != "params":
        raise UsageError(
            f"Expected `--max-params` or `--max-size` with the space {space.kind}, got --{bound.name}. Its targets are "
            "shares of parameters."
        )
    changed = {"target": round(1 - bound.limit, 10), "share_of": "model"}
    if "of" in fields:
        latency = settings.evaluator.latency or LatencySettings()
        of_first = bound.where_first_is(latency.batches[0])
        changed["of"] = at_batch(QUANTITIES[bound.name], of_first.batch)
    try:
        target = type(space).model_validate({**space.model_dump(exclude_unset=True), **changed})
    except ValidationError as error:
        raise UsageError(problems(error, type(space), ["space"])[0]) from error
    return settings.model_copy(update={"space": target})


def target_lines(settings: Settings, shape: ModelShape) -> list[str]:
    """Lines that name each target as a share of the blocks and of the whole model; none where nothing gets smaller."""
    space = settings.space
    share_of: ShareOf | None = getattr(space, "share_of", None)
    if share_of is None or not shape.blocks:
        return []
    of = space.counts or getattr(space, "of", "params")
    held = held_by_blocks(shape, of)
    shares = block_shares(shape, space.targets, share_of, of)
    words = of.replace("_", " ")
    return [
        f"target: {share:.1%} of the blocks' {words}, {share * held:.1%} of the whole model's"
        for share in shares
    ]
