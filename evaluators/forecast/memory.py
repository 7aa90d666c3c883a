"""Memory and disk of a search or a pruning, counted by running its own code on a model without memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from secateur.evaluators.blockwise import changed_bytes, prefix_bytes
from secateur.evaluators.data.windows import Batch, EvaluationData, batch_tokens
from secateur.evaluators.forecast.prospect import Outline
from secateur.evaluators.losses import Teacher, loss_sums
from secateur.pruners.calibration.gradients import gradient_bytes
from secateur.pruners.calibration.kept_states import states_bytes
from secateur.pruners.calibration.pass_kinds import n_bytes
from secateur.pruners.calibration.stream import stream_blocks, walks
from secateur.pruners.models.memory import resident_bytes
from secateur.pruners.models.runner import BlockRunner
from secateur.pruners.models.skeleton import Counted
from secateur.pruners.pruner import Pruner
from secateur.spaces.forecast import PHASES, PROCESS, Holding, Phase, with_copies
from secateur.spaces.measurement import Fidelity, Part


@contextmanager
def counting(found: Outline) -> Iterator[Counted]:
    """Context that counts tensors without memory beyond the model's own."""
    with Counted(found.n_experts) as counted:
        model = found.anatomy.model
        counted.ignore([*model.parameters(), *model.buffers()])
        yield counted


def empty_tokens(n_tokens: int, window: int) -> Tensor:
    """Windows of token ids without memory."""
    return torch.zeros(max(1, n_tokens // window), window, dtype=torch.int64, device="meta")


def of_process() -> Holding:
    """The interpreter with its libraries, as this process has them now."""
    return Holding(PROCESS, "host", resident_bytes(), PHASES, "this process as it is")


def of_weights(found: Outline, phases: Sequence[Phase]) -> list[Holding]:
    """The model's weights, and what loading takes besides."""
    model = found.anatomy.model
    n_values = sum(x.numel() for x in model.parameters())
    held = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    dtype = str(found.dtype).removeprefix("torch.")
    mapped = found.device.type == "cpu" and found.stored == found.dtype
    why = f"{n_values:,} parameters in {dtype}" + (", mapped from their files" if mapped else "")
    holdings = [Holding("weights", "device", held, tuple(phases), why, "dtype", mapped=mapped)]
    if not mapped:
        files = "files of the weights, mapped while they are converted"
        holdings.append(
            Holding(
                files, "host", n_values * found.stored.itemsize, ("load",), "as stored", "dtype", mapped=True
            )
        )
    if found.device.type != "cpu":
        holdings.append(
            Holding("weights on their way", "host", held, ("load",), "copied to the device after")
        )
    return holdings


def of_streamed_weights(found: Outline, phases: Sequence[Phase], working: Sequence[Phase]) -> list[Holding]:
    """The weights of a streamed model: mapped; in the dtype to compute in a block, and all outside of the blocks.

    Args:
        working: phases in which blocks are held; in the others a module is.
    """
    model, blocks = found.anatomy.model, found.anatomy.blocks
    n_values = sum(x.numel() for x in model.parameters())
    inside = [sum(x.numel() for x in block.module.parameters()) for block in blocks]
    size, dtype = found.dtype.itemsize, str(found.dtype).removeprefix("torch.")
    why = f"{n_values:,} parameters in their files"
    holdings = [
        Holding("weights", "host", n_values * found.stored.itemsize, tuple(phases), why, "dtype", mapped=True)
    ]
    if found.stored != found.dtype:
        outside = (n_values - sum(inside)) * size
        why = f"embedding, head and norms in {dtype}"
        holdings.append(
            Holding("weights outside of the blocks", "host", outside, tuple(phases), why, "dtype")
        )
        why = f"in {dtype}, while it is worked on, and the next one"
        holdings.append(Holding("blocks", "host", 2 * max(inside) * size, tuple(working), why, "dtype"))
        others = tuple(phase for phase in phases if phase not in working)
        largest = max(x.numel() for block in blocks for x in block.module.parameters()) * size
        holdings.append(Holding("a module", "host", largest, others, f"in {dtype}, while it runs", "dtype"))
    return holdings


def of_statistics(
    found: Outline, streamed: Mapping[str, Any], kinds: Sequence[Any], tokens: Tensor, phase: Phase
) -> list[Holding]:
    """Hidden states of the calibration tokens, statistics and activations of a block, and gradients."""
    anatomy, holdings = found.anatomy, []
    size = f"{tokens.numel():,} calibration tokens"
    if streamed:
        with counting(found) as counted:
            for _ in islice(stream_blocks(anatomy, tokens, **streamed), 2):
                pass
        states = tokens.numel() * anatomy.width * found.dtype.itemsize
        setting = "evaluator.calibration_tokens"
        holdings.append(Holding("hidden states", "device", states, (phase,), size, setting))
        rest = max(0, counted.most - states)
        why = "the states behind it, its statistics, and activations of a batch"
        holdings.append(Holding("statistics of a block", "device", rest, (phase,), why, setting))
    if kinds:
        n_all = gradient_bytes(anatomy, kinds, tokens.shape[1])
        why = f"{', '.join(kinds)}; one window's work, in float32"
        holdings.append(
            Holding("gradients", "device", n_all, (phase,), why, "space.metric, evaluator.window")
        )
    return holdings


def of_kept_states(
    found: Outline, streamed: Mapping[str, Any], tokens: Tensor, phase: Phase
) -> list[Holding]:
    """Hidden states of the calibration tokens that a walk keeps on the disk between blocks, see `KeptStates`."""
    if not walks(**streamed):
        return []
    why = f"of {tokens.numel():,} tokens, before and after a block: a killed walk goes on from them"
    n_bytes, setting = states_bytes(found.anatomy, tokens), "evaluator.calibration_tokens"
    return [Holding("hidden states, kept", "disk", n_bytes, (phase,), why, setting)]


def of_states(found: Outline, n_tokens: int, phase: Phase) -> list[Holding]:
    """Hidden states of so many tokens in files before and after a block; mapped while they are read."""
    n_bytes = n_tokens * found.anatomy.width * found.dtype.itemsize
    why = f"of {n_tokens:,} tokens, before and after a block"
    setting = "evaluator.calibration_tokens, --tokens"
    return [
        Holding("hidden states, kept", "disk", 2 * n_bytes, (phase,), why, setting),
        Holding("hidden states, kept", "host", n_bytes, (phase,), why, setting, mapped=True),
    ]


def of_store(pruner: Pruner, phases: Sequence[Phase]) -> list[Holding]:
    """The level store on the disk, which is mapped while candidates are measured, and gradients beside it."""
    stored = pruner.stored_bytes()
    n_weights = sum(linear.n_weights for linear in pruner.anatomy.linears)
    kept = sum(map(n_bytes, pruner.gradients)) * n_weights
    on_disk: tuple[Phase, ...] = ("prepare", "search", "test")
    why = f"{stored / n_weights:.3g} bytes a prunable weight"
    setting = "space.step, space.max_sparsity, space.metric"
    holdings = [
        Holding("level store", "disk", stored, on_disk, why, setting),
        Holding(
            "level store, mapped", "host", stored, tuple(phases), "pages that were used", setting, mapped=True
        ),
    ]
    if kept:
        holdings.append(Holding("gradients", "disk", kept, on_disk, "kept beside the levels", "space.metric"))
    return holdings


def of_candidates(pruner: Pruner, states: int | None, phases: Sequence[Phase]) -> list[Holding]:
    """Changed blocks and outputs of shared blocks.

    Args:
        states: bytes of all outputs of blocks that a search would keep; None: not known.
    """
    limit = prefix_bytes(pruner.anatomy)
    shared = limit if states is None else min(limit, states)
    holdings = [
        Holding(
            "outputs of shared blocks",
            "device",
            shared,
            tuple(phases),
            _of_states(pruner, shared == limit),
            "evaluator.window",
        )
    ]
    if pruner.copies:
        n_all = changed_bytes(pruner.anatomy)
        holdings.append(Holding("changed blocks", "device", n_all, tuple(phases), "products of masks"))
    return holdings


def _of_states(pruner: Pruner, most: bool) -> str:
    if not most:
        return "as many as there are"
    return (
        "a sixteenth of the model at most"
        if pruner.anatomy.room is None
        else "an eighth of the device's room"
    )


def of_levels(pruner: Pruner, phases: Sequence[Phase]) -> list[Holding]:
    """Levels on the device: all of them where they fit, else as many as its room has for them; none on a CPU."""
    room = pruner.anatomy.room
    if room is None or not pruner.on_device:
        return []
    stored = pruner.stored_bytes()
    held = min(stored, room.levels)
    why = (
        "all of them"
        if held == stored
        else f"of {stored / 1e9:,.2f} GB; the others are copied when they are used"
    )
    return [
        Holding("levels on the device", "device", held, tuple(phases), why, "space.step, space.max_sparsity")
    ]


def of_data(
    found: Outline,
    window: int,
    sizes: Mapping[Part, int],
    phases: Mapping[Part, Sequence[Phase]],
    *,
    shared: bool = False,
) -> list[Holding]:
    """Dense side of the loss on all windows, and the work of one batch.

    One batch is counted, and stands for the others.

    Args:
        sizes: tokens of each part, the largest fidelity's.
        phases: in which each part is held; its work is in the first of them.
        shared: the processes of a node map one copy from the disk.
    """
    anatomy, holdings = found.anatomy, []
    setting = "evaluator.fidelities, evaluator.test_tokens"
    free = EvaluationData.n_kept(anatomy, sum(sizes.values()))
    for part, n_tokens in sizes.items():
        of_batch = min(n_tokens, max(1, batch_tokens(anatomy) // window) * window)
        with counting(found) as counted:
            windows: dict[Part, Tensor] = {part: empty_tokens(of_batch, window)}
            counted.ignore(windows.values())
            fidelity = Fidelity(part, of_batch)
            data = EvaluationData(anatomy, windows, [fidelity])
            [batch, *_] = data.of(fidelity)
            held, work = counted.now, counted.most - counted.now
            work = max(work, _batch_bytes(found, batch, counted))
        n_kept, free = min(free, n_tokens), max(0, free - n_tokens)
        of_token, of_state = Teacher.bytes_per_token(anatomy), anatomy.width * found.dtype.itemsize
        dense = of_batch * (of_token if EvaluationData.n_kept(anatomy, of_batch) == of_batch else of_state)
        n_bytes = round((held - dense) * n_tokens / of_batch) + n_kept * of_token
        n_bytes += (n_tokens - n_kept) * of_state
        why = f"probabilities of {n_kept:,} of {n_tokens:,} positions over {anatomy.vocab_size:,} tokens"
        name = f"dense side of the loss, {part} text"
        if shared:
            holdings.append(Holding(name, "disk", n_kept * of_token, tuple(phases[part]), why, setting))
        holdings.append(Holding(name, "device", n_bytes, tuple(phases[part]), why, setting))
        why = f"activations and logits of {of_batch:,} tokens"
        name, first = f"work of a batch, {part} text", (phases[part][0],)
        holdings.append(Holding(name, "device", work, first, why, "evaluator.window"))
    return holdings


def _batch_bytes(found: Outline, batch: Batch, counted: Counted) -> int:
    """Bytes of the work on a batch beyond what is held."""
    before, counted.most = counted.now, counted.now
    hidden = BlockRunner(found.anatomy).block(0, batch.inputs.hidden, batch.inputs)
    loss_sums(found.anatomy, hidden, batch.tokens, batch.teacher)
    return counted.most - before


def of_pruned(found: Outline, phases: Sequence[Phase], *, streamed: bool = False) -> list[Holding]:
    """Weights that pruning makes beside the dense ones, which are mapped or held to the end; if streamed, a block's."""
    sizes = [sum(linear.weight.nbytes for linear in block.linears) for block in found.anatomy.blocks]
    n_bytes = max(sizes) if streamed else sum(sizes)
    why = "new tensors of the projections that change, at most" + (", in a block" if streamed else "")
    return [Holding("pruned weights", "device", n_bytes, tuple(phases), why, "--sparsity")]


def of_export(found: Outline, *, streamed: bool = False, n_models: int = 1) -> list[Holding]:
    """The written models, and the process that loads one again; as it is stored, and mapped, if streamed."""
    n_values = sum(x.numel() for x in found.anatomy.model.parameters())
    stored = n_values * found.stored.itemsize
    why = "at most: a smaller model's is smaller"
    holdings = [Holding("exported model", "disk", n_models * stored, ("export",), why, "--format")]
    if streamed:
        again = Holding("the model, loaded again", "host", resident_bytes(), ("export",), "mapped")
        return [*holdings, *with_copies([again], 1)]
    if found.stored != found.dtype:
        why = "weights rounded as they are stored"
        holdings.append(Holding("weights to write", "host", stored, ("export",), why, "dtype"))
    again = Holding(
        "the model, loaded again", "host", resident_bytes() + n_values * found.dtype.itemsize, ("export",)
    )
    return [*holdings, *with_copies([again], 1)]
