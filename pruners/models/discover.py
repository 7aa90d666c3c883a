"""Search for the anatomy of a causal LM by structure, without a table of model classes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn

from secateur.pruners.models.anatomy import Anatomy, Block
from secateur.pruners.models.projections import find_linears
from secateur.pruners.models.tail import find_tail

# The values of `model_type` that tests run; others that are built alike work too.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt", "gpt2", "gpt_neox")


def dissect(model: nn.Module, bos: int | None = None) -> Anatomy:
    """The blocks of a causal LM, the projections in them, and the modules before and after.

    The blocks are the one list of `config.num_hidden_layers` alike modules; the projections are told by their
    names and checked by their shapes; the modules after the last block are found by running two tokens through the
    model. The model is not changed.

    Args:
        model: a causal LM of transformers, on the device where it is to run.
        bos: token that windows begin with, see `Anatomy`.

    Raises:
        ValueError: if some part is not found or not understood; the message says which.
    """
    try:
        return _dissect(model, bos)
    except ValueError as error:
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"Unknown model family {family!r}: {error} Families known to work: {', '.join(FAMILIES)}."
        ) from error


def _dissect(model: nn.Module, bos: int | None) -> Anatomy:
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError("Expected a decoder-only model with a config, got another kind.")
    name, container = _find_container(model, getattr(config, "num_hidden_layers", None))
    embedding, head = _find_ends(model)
    blocks = tuple(_block(module, f"{name}.{index}", index, config) for index, module in enumerate(container))
    tail, logits = find_tail(model, container, head)
    paths = {module: path for path, module in model.named_modules()}
    return Anatomy(
        family=config.model_type,
        model=model,
        container=container,
        blocks=blocks,
        embedding=embedding,
        tail=tail,
        head=head,
        logits=logits,
        width=blocks[0].linears[-1].out_features,
        vocab_size=head.out_features,
        final_norm=next((paths[module] for module in tail if _is_norm(module)), ""),
        bos=bos,
    )


def _find_container(model: nn.Module, n_blocks: int | None) -> tuple[str, nn.ModuleList]:
    """The outermost list of `n_blocks` modules of one class, with its path."""
    outer: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():  # outer ones first
        is_stack = isinstance(module, nn.ModuleList) and len(module) == n_blocks
        if is_stack and len(set(map(type, module))) == 1 and not any(name.startswith(f"{x}.") for x in outer):
            outer[name] = module
    if len(outer) != 1:
        raise ValueError(
            f"Expected one list of {n_blocks} alike blocks (config.num_hidden_layers), "
            f"found {', '.join(outer) or 'none'} in {type(model).__name__}."
        )
    return next(iter(outer.items()))


def _find_ends(model: Any) -> tuple[nn.Embedding, nn.Linear]:
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


def _block(module: nn.Module, name: str, index: int, config: Any) -> Block:
    """One block, its shapes checked against the config's heads."""
    window = _window(config, index)
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[index]
    skipped = frozenset(getattr(config, "skip", ()))
    linears = find_linears(module, name, index, skipped)
    width = linears[-1].out_features
    ffn_width = 0 if "mlp" in skipped else linears[-1].in_features
    n_heads = 0 if "attention" in skipped else config.num_attention_heads
    n_kv_heads = n_heads and (getattr(config, "num_key_value_heads", None) or n_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    q, kv = n_heads * head_dim, n_kv_heads * head_dim
    wanted = {  # role: (out, in)
        "q": (q, width),
        "k": (kv, width),
        "v": (kv, width),
        "qkv": (q + 2 * kv, width),
        "o": (width, q),
        "gate": (ffn_width, width),
        "up": (ffn_width, width),
        "gate_up": (2 * ffn_width, width),
        "down": (config.hidden_size, ffn_width),
    }
    for linear in linears:
        out_features, in_features = wanted[linear.role]
        if tuple(linear.weight.shape) != (out_features, in_features):
            raise ValueError(
                f"Expected the {linear.role} projection to be {out_features} x {in_features} (out x in, from the "
                f"config's heads and widths), got {linear.out_features} x {linear.in_features} [at {linear.name}]."
            )
    norms = tuple(f"{name}.{path}" for path, child in module.named_modules() if _is_norm(child))
    return Block(index, name, module, linears, n_heads, n_kv_heads, head_dim, ffn_width, norms, window)


def _window(config: Any, index: int) -> int | None:
    """Sliding window of the attention of a block, as the family's config gives it."""
    kinds = getattr(config, "layer_types", None)
    sliding = kinds is None or kinds[index] == "sliding_attention"
    return getattr(config, "sliding_window", None) if sliding else None


def _is_norm(module: nn.Module) -> bool:
    """True for LayerNorm, RMSNorm and the families' own classes of them."""
    return type(module).__name__.endswith("Norm")
