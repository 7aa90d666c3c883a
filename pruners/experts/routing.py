"""Routing of calibration tokens: how many each expert gets, and the experts that get too few."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.pruners.models.anatomy import Anatomy, Block
from secateur.pruners.models.runner import BlockRunner

ENOUGH = 64
"""Tokens below which the statistics of an expert are mostly chance. [INFER] No paper gives a number."""

BATCH_TOKENS = 4096


@torch.no_grad()
def routed_tokens(anatomy: Anatomy, tokens: Int[Tensor, "windows length"]) -> dict[str, int]:
    """Number of tokens that are routed to each expert, by its full name; empty of a model without mixtures."""
    mixtures = [block.mixture for block in anatomy.blocks if block.mixture]
    counts = {f"{x.name}.experts.{index}": 0 for x in mixtures for index in range(x.n_experts)}
    if not mixtures:
        return counts
    runner, hooks = BlockRunner(anatomy), []
    try:
        for mixture in mixtures:
            hook = partial(_count, f"{mixture.name}.experts", counts)
            hooks.append(mixture.experts.register_forward_pre_hook(hook, with_kwargs=True))
        for part in tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])):
            runner.run(runner.start(part))
    finally:
        for handle in hooks:
            handle.remove()
    return counts


def starved_experts(anatomy: Anatomy, tokens: Int[Tensor, "windows length"]) -> dict[str, int]:
    """The experts that fewer than `ENOUGH` tokens are routed to, by full name, with how many."""
    return {name: n for name, n in routed_tokens(anatomy, tokens).items() if n < ENOUGH}


@contextmanager
def every_token(block: Block) -> Iterator[None]:
    """Context in which each expert of a block runs on all tokens, so that hooks on its projections see them.

    What the block gives stays the same. llm-compressor's ``moe_calibrate_all_experts``
    (https://github.com/vllm-project/llm-compressor).
    """
    experts = None if block.mixture is None else block.mixture.experts
    if experts is None:
        yield
        return
    experts.every_token = True
    try:
        yield
    finally:
        experts.every_token = False


def _count(
    name: str, counts: dict[str, int], module: Any, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]
) -> None:
    for place, (rows, _) in enumerate(module.routed(*args, *kwargs.values())):
        counts[f"{name}.{module.kept[place]}"] += len(rows)
