"""Importance of hidden channels by activations, and the scale of norms over those that stay (Minitron)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.narrow import Narrow, narrow_norm, plain_norm
from secateur.pruners.models.probe import evaluating, probe_tokens
from secateur.pruners.models.stream_axes import stream_norms
from secateur.pruners.stores.block_files import load_tensors, save_tensors


@dataclass(frozen=True)
class HiddenOrder:
    """Hidden channels in the order of importance, and factors of norms at some widths.

    Args:
        order: numbers of all channels, the most important first.
        factors: for each width a row, for each norm of `stream_norms` a column.
        widths: numbers of kept channels.
        names: of the norms.
    """

    order: Int[Tensor, " width"]
    factors: Float[Tensor, "widths norms"]
    widths: tuple[int, ...]
    names: tuple[str, ...]

    def at(self, width: int) -> Narrow:
        """The channels that stay at one of the widths."""
        row = self.factors[self.widths.index(width)].tolist()
        channels = tuple(sorted(self.order[:width].tolist()))
        return Narrow(channels, dict(zip(self.names, row, strict=True)))


def hidden_order(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    widths: Sequence[int],
    path: Path | None = None,
    identity: str = "",
) -> HiddenOrder:
    """Order of the dense model's hidden channels, read from a file if it has one of this identity.

    Args:
        tokens: calibration windows.
        widths: at which norms are scaled.
        path: of the file; None: none.
        identity: of the model and the tokens, in one text.

    Raises:
        ValueError: if the model can't lose hidden channels, see `stream_norms`, or activations are not finite.
    """
    names = tuple(stream_norms(anatomy))
    identity = f"{identity} {tuple(widths)}"
    known = None if path is None or not path.exists() else load_tensors(path, identity)
    if known is None:
        order = channel_scores(anatomy, tokens).argsort(descending=True, stable=True)
        known = {"order": order, "factors": _factors(anatomy, tokens, order, widths)}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(path, known, identity)
    return HiddenOrder(known["order"], known["factors"], tuple(widths), names)


def read_order(path: Path, anatomy: Anatomy, widths: Sequence[int]) -> HiddenOrder:
    """The order that `hidden_order` wrote."""
    known = load_tensors(path, None)
    assert known is not None, "written before workers start"
    return HiddenOrder(known["order"], known["factors"], tuple(widths), tuple(stream_norms(anatomy)))


def order_bytes(anatomy: Anatomy, widths: Sequence[int]) -> int:
    """Bytes of the tensors that `hidden_order` writes; the model may be without memory."""
    return 8 * (anatomy.width + len(widths) * len(stream_norms(anatomy)))


@torch.no_grad()
def channel_scores(anatomy: Anatomy, tokens: Int[Tensor, "windows length"]) -> Float[Tensor, " width"]:
    """Size of each hidden channel, higher = keep.

    Minitron (Muralidharan et al. 2024, arXiv 2407.14679, section 2.2, mean and l2 as aggregates): of the outputs of
    every norm that an attention or an MLP reads the mean over tokens of ``|x_j|``, its l2 norm over windows, summed
    over the norms. Where no mixer reads a norm (norms behind them), all norms inside blocks count.

    Raises:
        ValueError: if one is not finite.
    """
    norms = stream_norms(anatomy)
    read = _read_by_mixers(anatomy, norms) or [name for name in norms if name != anatomy.final_norm]
    sums = {name: torch.zeros(anatomy.width, dtype=torch.float64) for name in read}

    def add(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        mean = output.double().abs().flatten(0, -2).mean(0).cpu()
        sums[name] += mean.square()

    _through(anatomy, tokens, {name: partial(add, name) for name in read})
    score = torch.stack([total.sqrt() for total in sums.values()]).sum(0)
    if not torch.isfinite(score).all():
        raise ValueError(
            "Expected finite activations for the order of hidden channels, got NaN or infinity. Check the calibration "
            "text."
        )
    return score


def _read_by_mixers(anatomy: Anatomy, norms: dict[str, nn.Module]) -> list[str]:
    """Norms whose output is what another module of their block gets first, such as a projection or a whole mixer."""
    outputs: dict[int, str] = {}
    held: list[Tensor] = []
    found: dict[str, None] = {}

    def after(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[id(output)] = name
        held.append(output)  # so that no other tensor gets its id

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = outputs.get(id(next(iter((*args, *kwargs.values())), None)))
        if name is not None:
            found[name] = None

    with ExitStack() as hooks:
        for name, norm in norms.items():
            if name != anatomy.final_norm:
                hooks.callback(norm.register_forward_hook(partial(after, name)).remove)
        for block in anatomy.blocks:
            for module in set(block.module.modules()) - set(norms.values()):
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        with evaluating(anatomy.model):
            anatomy.model(input_ids=probe_tokens(anatomy.model), use_cache=False)
    return [name for name in norms if name in found]


def _factors(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    order: Int[Tensor, " width"],
    widths: Sequence[int],
) -> Float[Tensor, "widths norms"]:
    """Factor of each norm at each width by which its outputs over the kept channels come nearest to the dense ones.

    Least squares over the calibration tokens, without weights and biases. An RMS norm over fewer channels divides by
    the root of another mean: that of the kept channels, which are larger than the others, in place of all.
    Minitron leaves the weights as they are.
    """
    norms = stream_norms(anatomy)
    plain = {name: plain_norm(norm) for name, norm in norms.items()}
    kept = [order[:width].sort().values for width in widths]
    small = {name: [narrow_norm(plain[name], x.tolist()) for x in kept] for name in norms}
    sums = {name: torch.zeros(2, len(widths), dtype=torch.float64) for name in norms}

    def add(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        dense = plain[name](args[0]).double()
        for row, (channels, norm) in enumerate(zip(kept, small[name], strict=True)):
            index = channels.to(dense.device)
            own = norm(args[0][..., index]).double()
            sums[name][0, row] += float((own * dense[..., index]).sum())
            sums[name][1, row] += float(own.square().sum())

    _through(anatomy, tokens, {name: partial(add, name) for name in norms})
    return torch.stack([top / bottom for top, bottom in sums.values()], 1)


def _through(anatomy: Anatomy, tokens: Int[Tensor, "windows length"], hooks: dict[str, Any]) -> None:
    """Run the model window by window, with hooks on some of its modules."""
    modules = dict(anatomy.model.named_modules())
    with ExitStack() as stack, evaluating(anatomy.model):
        for name, hook in hooks.items():
            stack.callback(modules[name].register_forward_hook(hook).remove)
        for window in tokens:
            anatomy.model(input_ids=window[None].to(anatomy.embedding.weight.device), use_cache=False)
