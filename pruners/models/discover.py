"""Search for the anatomy of a causal LM by structure, without a table of model classes."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

from torch import nn

from secateur.pruners.models.anatomy import Anatomy, Block, Sublayer
from secateur.pruners.models.experts import split_experts
from secateur.pruners.models.mixers import MixesTokens, find_mixers, is_kept
from secateur.pruners.models.probe import check_blocks, mixes_tokens
from secateur.pruners.models.room import room_beside
from secateur.pruners.models.tail import find_tail
from secateur.pruners.models.usable import NotFiniteError


def dissect(model: nn.Module, bos: int | None = None) -> Anatomy:
    """The blocks of a causal LM, the projections in them, and the modules before and after.

    The blocks are the one list of `config.num_hidden_layers` modules beside the token embedding, so that of a model of
    text and images the language tower alone is found; mixers are found by `find_mixers`; the modules after the last
    block by running a few tokens through the model, and run block by block the model must give the same. The model is
    not changed.

    Args:
        model: a causal LM of transformers, on the device where it is to run.
        bos: token that windows begin with, see `Anatomy`.

    Raises:
        ValueError: if some part is not found or not understood; the message says which.
    """
    try:
        return _dissect(model, bos)
    except NotFiniteError:
        raise
    except ValueError as error:
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"Unknown model family {family!r}: {error} Those known to work: secateur list families."
        ) from error


def _dissect(model: nn.Module, bos: int | None) -> Anatomy:
    whole: Any = getattr(model, "config", None)
    if whole is None or getattr(whole, "is_encoder_decoder", False):
        raise ValueError("Expected a decoder-only model with a config, got another kind.")
    config = text_config(whole)
    split_experts(model)
    embedding, head = find_ends(model)
    name, container = find_container(model, embedding, getattr(config, "num_hidden_layers", None))
    _check_own(name, container)
    mixes = partial(mixes_tokens, model)
    blocks = tuple(
        _block(module, f"{name}.{index}", index, config, mixes) for index, module in enumerate(container)
    )
    output = next((linear for block in blocks for linear in block.linears if linear.is_output), None)
    if output is None:
        shapes = {path: tuple(blocks[0].module.get_parameter(path).shape) for path in blocks[0].unknown}
        stacked = [f"{path} {shape}" for path, shape in shapes.items() if len(shape) > 2]
        raise ValueError(
            f"Expected output projections that are understood, got none in {name}"
            f"{', whose blocks have stacks of matrices: ' if stacked else ''}{', '.join(stacked)}."
        )
    tail, logits, n_outputs = find_tail(model, container, head, config)
    paths = {module: path for path, module in model.named_modules()}
    anatomy = Anatomy(
        family=whole.model_type,
        model=model,
        container=container,
        blocks=blocks,
        embedding=embedding,
        tail=tail,
        head=head,
        logits=logits,
        width=output.out_features,
        vocab_size=head.out_features,
        final_norm=next((paths[module] for module in tail if is_norm(module)), ""),
        n_outputs=n_outputs,
        bos=bos,
        room=room_beside(model, head.weight.device),
    )
    check_blocks(anatomy)
    return anatomy


def text_config(config: Any) -> Any:
    """Config of the language tower; the config itself if it has no parts.

    Raises:
        ValueError: if there are several.
    """
    try:
        return config.get_text_config()
    except ValueError as error:
        raise ValueError(f"Expected one language tower, got {type(config).__name__} with several.") from error


def find_container(model: nn.Module, embedding: nn.Module, n_blocks: int | None) -> tuple[str, nn.ModuleList]:
    """The outermost list of `n_blocks` modules, with its path; of several the one in the tower of the embedding."""
    tower = next(path for path, module in model.named_modules() if module is embedding).rpartition(".")[0]
    outer: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():  # outer ones first
        is_stack = isinstance(module, nn.ModuleList) and len(module) == n_blocks
        if is_stack and not any(name.startswith(f"{x}.") for x in outer):
            outer[name] = module
    outer = {name: module for name, module in outer.items() if name.startswith(tower)} or outer
    if len(outer) != 1:
        raise ValueError(
            f"Expected one list of {n_blocks} alike blocks (config.num_hidden_layers), "
            f"found {', '.join(outer) or 'none'} in {type(model).__name__}."
        )
    return next(iter(outer.items()))


def _check_own(name: str, container: nn.ModuleList) -> None:
    """Raise a ValueError if blocks share parameters, as a transformer that several blocks of Zamba use."""
    owners: dict[int, int] = {}
    for index, module in enumerate(container):
        for path, parameter in module.named_parameters():
            first = owners.setdefault(id(parameter), index)
            if first != index:
                raise ValueError(
                    f"Expected blocks with parameters of their own, got {name}.{index} and {name}.{first}, which share "
                    f"{path}."
                )


def find_ends(model: Any) -> tuple[nn.Embedding, nn.Linear]:
    """The token embedding and the output projection, as the model names them itself."""
    embedding = head = None
    with suppress(AttributeError, NotImplementedError):
        embedding = model.get_input_embeddings()
    with suppress(AttributeError, NotImplementedError):
        head = model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ValueError(
            f"Expected a token embedding (Embedding) and a head (Linear), found {type(embedding).__name__} "
            f"and {type(head).__name__} in {type(model).__name__}."
        )
    return embedding, head


def _block(module: nn.Module, name: str, index: int, config: Any, mixes: MixesTokens) -> Block:
    """One block, its shapes checked against the config's heads."""
    window = _window(config, index)
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[index]
    mixers = find_mixers(module, name, index, config, mixes, frozenset(getattr(config, "skip", ())))
    norms = tuple(f"{name}.{path}" for path, child in module.named_modules() if is_norm(child))
    known = {linear.name for mixer in mixers for linear in mixer.linears}
    kinds = {
        linear.name.removeprefix(f"{name}.").partition(".")[0]: x.kind for x in mixers for linear in x.linears
    }
    unknown = tuple(
        path
        for path, value in module.named_parameters()
        if value.ndim > 1
        and f"{name}.{path.rpartition('.')[0]}" not in known
        and not _is_kept(module, path, kinds.get(path.partition(".")[0]))
    )
    return Block(index, name, module, mixers, norms, window, unknown)


def _is_kept(block: nn.Module, path: str, kind: Sublayer | None) -> bool:
    """True for matrices kept on purpose: states, gates and convolutions of recurrent mixers, routers, step sizes."""
    if kind == "experts":
        return block.get_parameter(path).ndim == 2
    return kind == "recurrent" or is_kept(path.rpartition(".")[0])


def _window(config: Any, index: int) -> int | None:
    """Largest number of tokens that a block's attention sees, by the family's config; None: all."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    kind = "sliding_attention" if kinds is None else kinds[index]
    name = WINDOWS.get(kind)
    window: int | None = None if name is None else getattr(config, name, None)
    return window


WINDOWS = {
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",  # Llama 4
    "local": "window_size",  # GPT-Neo
    "attention": "attention_window_size",  # RecurrentGemma
}
"""Kinds of attention that see a part of the tokens, with the name of its length in configs."""


def is_norm(module: nn.Module) -> bool:
    """True for LayerNorm, RMSNorm and the families' own classes of them."""
    return "Norm" in type(module).__name__
