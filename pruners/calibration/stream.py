"""Walk of the calibration tokens through a model, block by block: statistics, hidden states, the loss."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.kept_states import KeptStates
from secateur.pruners.calibration.statistics import Collector, HookOf, InputStatistics, OutputStatistics
from secateur.pruners.depth.shortgpt import block_influence
from secateur.pruners.experts.evidence import ExpertEvidence, MixtureRecorder
from secateur.pruners.experts.routing import every_token
from secateur.pruners.models.anatomy import Anatomy, Block
from secateur.pruners.models.runner import BlockInputs, BlockRunner
from secateur.spaces.method import Detail

BATCH_TOKENS = 4096


def most(*details: Detail) -> Detail:
    """The largest of these details, which serves all."""
    return max(details, key=get_args(Detail).index)


class Walk:
    """Walk of tokens through a model: hidden states before each block, in batches.

    Args:
        batch_tokens: computed by a block at a time.

    Attributes:
        hidden: of each batch, before the block that comes next; may be replaced.
    """

    def __init__(
        self, anatomy: Anatomy, tokens: Int[Tensor, "windows length"], batch_tokens: int = BATCH_TOKENS
    ) -> None:
        self._runner = BlockRunner(anatomy)
        self._length = tokens.shape[1]
        rows = max(1, batch_tokens // self._length)
        batches = [self._runner.start(part) for part in tokens.split(rows)]
        self.hidden: list[Float[Tensor, "batch length width"]] = [batch.hidden for batch in batches]
        self._batches: list[BlockInputs] = [
            replace(batch, hidden=batch.hidden.new_empty(0, 0, 0)) for batch in batches
        ]

    def through(
        self, block: Block, watch: Sequence[HookOf] = ()
    ) -> list[Float[Tensor, "batch length width"]]:
        """The block's outputs, with the weights that it has now; hooks see the inputs of its projections."""
        device = block.linears[0].weight.device
        self.hidden = [x.to(device) for x in self.hidden]  # of a model over several
        with ExitStack() as hooks:
            for linear in block.linears:
                for hook in filter(None, (hook_of(linear) for hook_of in watch)):
                    hooks.callback(linear.module.register_forward_pre_hook(hook).remove)
            return [
                self._runner.block(block.index, states, batch)
                for states, batch in zip(self.hidden, self._batches, strict=True)
            ]

    def collect(
        self,
        block: Block,
        *,
        inputs: Detail | Literal["both"] = "nothing",
        outputs: Detail = "nothing",
        experts: bool = False,
        expert_outputs: bool = False,
    ) -> tuple[BlockStatistics, list[Float[Tensor, "batch length width"]]]:
        """The block's statistics, as `stream_blocks` describes them, and its outputs, from one pass."""
        of_inputs = Collector(InputStatistics, self._length, gram=inputs == "gram")
        of_outputs = Collector(OutputStatistics, self._length, gram=outputs == "gram", experts=expert_outputs)
        grams = Collector(InputStatistics, self._length, gram=True)
        watch = [of_inputs.hook] if inputs != "nothing" else []
        watch += [of_outputs.hook] if outputs != "nothing" else []
        watch += [grams.hook] if inputs == "both" else []
        mixture = block.mixture if experts else None
        recorder = None if mixture is None else MixtureRecorder(mixture, block.module)
        all_experts = self._runner.anatomy.all_experts and inputs != "nothing"
        widened = every_token(block) if all_experts else nullcontext()
        with widened, recorder.watching() if recorder else nullcontext():
            hidden = self.through(block, watch)
        statistics = BlockStatistics(
            block,
            of_inputs.of(block) if inputs != "nothing" else {},
            of_outputs.found,
            grams.of(block) if inputs == "both" else {},
            block_influence(self.hidden, hidden) if outputs != "nothing" else 0.0,
            recorder.evidence if recorder else None,
        )
        return statistics, hidden


@dataclass(frozen=True)
class BlockStatistics:
    """A block with the requested statistics of its projections, by their full names.

    Args:
        block: the block.
        inputs: of all projections; those that read the same input (q, k and v; gate and up) share one object.
        outputs: of its output projections.
        grams: as `inputs`, with Gram matrices.
        influence: see `shortgpt.block_influence`; 0 where no `outputs` were asked for.
        experts: evidence of the block's mixture, where it was asked for and there is one.
    """

    block: Block
    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    outputs: dict[str, OutputStatistics] = field(default_factory=dict)
    grams: dict[str, InputStatistics] = field(default_factory=dict)
    influence: float = 0.0
    experts: ExpertEvidence | None = None


def walks(
    *,
    inputs: Detail | Literal["both"] = "nothing",
    outputs: Detail = "nothing",
    experts: bool = False,
    **_: Any,
) -> bool:
    """True if `stream_blocks` runs blocks for what these arguments ask for."""
    return experts or inputs != "nothing" or outputs != "nothing"


@torch.no_grad()
def stream_blocks(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    *,
    inputs: Detail | Literal["both"] = "nothing",
    outputs: Detail = "nothing",
    gram_blocks: Collection[int] = (),
    experts: bool = False,
    expert_outputs: bool = False,
    sequential: bool = False,
    missing: Collection[int] | None = None,
    kept: KeptStates | None = None,
) -> Iterator[BlockStatistics]:
    """Yield each block with its statistics; the consumer may prune the block before the next one.

    Memory beyond the model: the hidden states of the calibration tokens and one block's statistics. Without
    statistics no block is run.

    Args:
        inputs: statistics of all projections' inputs: moments, or full second moments whose diagonal they then are;
            both: moments that do not depend on the Gram matrices beside them, in `grams`.
        outputs: statistics of output projections.
        gram_blocks: blocks whose `inputs` get full second moments where moments are asked for.
        experts: collect the evidence of mixtures.
        expert_outputs: collect statistics of the output projections of routed experts, too.
        sequential: compute a block's output with the weights that the consumer gave it, so that later statistics come
            from already pruned blocks. Otherwise one pass serves statistics and output, and all statistics are those
            of the model as it was.
        missing: blocks whose statistics are wanted; None: of all. Others are yielded as far as they lead to these,
            without statistics where nothing depends on them.
        kept: states that a killed walk left, from which this one goes on; written behind each block.
    """
    wanted = range(len(anatomy.blocks)) if missing is None else missing
    last = max(wanted, default=-1)
    if not walks(inputs=inputs, outputs=outputs, experts=experts):
        for block in anatomy.blocks[: last + 1]:
            with anatomy.hold(block):
                yield BlockStatistics(block)
        return
    walk = Walk(anatomy, tokens)
    found = kept and kept.before(wanted)
    first, states = found or (0, walk.hidden)
    walk.hidden = [x.to(anatomy.embedding.weight.device) for x in states]
    for block in anatomy.blocks[first : last + 1]:
        with anatomy.hold(block):
            if block.index in wanted or sequential or anatomy.all_experts:
                statistics, hidden = walk.collect(
                    block,
                    inputs="gram" if inputs == "moments" and block.index in gram_blocks else inputs,
                    outputs=outputs,
                    experts=experts,
                    expert_outputs=expert_outputs,
                )
            else:
                statistics, hidden = BlockStatistics(block), walk.through(block)
            yield statistics
            walk.hidden = walk.through(block) if sequential else hidden
        del statistics, hidden
        if kept is not None and block.index < last:
            walk.hidden = list(kept.keep(block.index + 1, walk.hidden))
    if kept is not None:
        kept.remove()


@torch.no_grad()
def stream_states(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"]
) -> Iterator[Float[Tensor, "windows length width"]]:
    """Yield the input of the first block, then the output of each block, with its weights at that time."""
    walk = Walk(anatomy, tokens)
    yield torch.cat(walk.hidden)
    for block in anatomy.blocks:
        walk.hidden = walk.through(block)
        yield torch.cat(walk.hidden)


def mean_loss(
    anatomy: Anatomy, hidden: Float[Tensor, "windows length width"], tokens: Int[Tensor, "windows length"]
) -> float:
    """Mean cross-entropy of the next token, in nats, of the last block's output; logits of one window at a time."""
    first = anatomy.first_scored
    ids = tokens.to(anatomy.head.weight.device)
    windows = [_window_loss(anatomy, x, of_window, first) for x, of_window in zip(hidden, ids, strict=True)]
    return float(torch.stack(windows).double().mean())


def _window_loss(
    anatomy: Anatomy, hidden: Float[Tensor, "length width"], ids: Int[Tensor, " length"], first: int
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the next token over a window, whose logits are computed `BATCH_TOKENS` at a time."""
    losses, stop = [], len(ids) - 1
    for start in range(0, stop, BATCH_TOKENS):
        logits = anatomy.logits(anatomy.tail(hidden[None, start : start + BATCH_TOKENS]))[0]
        scored = slice(max(first, start), min(start + BATCH_TOKENS, stop))
        part = logits[scored.start - start : scored.stop - start].float()
        losses.append(F.cross_entropy(part, ids[scored.start + 1 : scored.stop + 1], reduction="sum"))
    return torch.stack(losses).sum() / (stop - first)
