"""Mixers of a block: what attends, recurs, or works on each token alone, by the structure of its projections."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, get_args

from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.pruners.models.anatomy import Heads, HeadVector, Linear, Mixer, Role, Sublayer
from secateur.pruners.models.experts import Expert, Experts
from secateur.pruners.models.mixture import find_mixture
from secateur.pruners.models.projections import check_complete, roles_of

ORDER: tuple[Sublayer, ...] = get_args(Sublayer)

MixesTokens = Callable[[nn.Module], bool]
"""True if what a module of the model gives for a token depends on earlier tokens."""


def find_mixers(
    block: nn.Module,
    name: str,
    index: int,
    config: Any,
    mixes_tokens: MixesTokens,
    skipped: Collection[str] = (),
) -> tuple[Mixer, ...]:
    """The mixers of a block.

    The projections below one child of the block are one mixer; those that are children themselves are an MLP. The roles
    of projections are told by `roles_of`, from names and shapes. A convolution makes a mixer recurrent, a list of
    modules a mixture of experts.

    Args:
        block: its module.
        name: its full path.
        index: its place in the stack.
        config: with the number of heads.
        mixes_tokens: asked about modules whose projections have roles of no kind.
        skipped: kinds that the block is without.

    Raises:
        ValueError: on a mixer with a projection missing, or shapes that contradict each other.
    """
    groups: dict[str, list[tuple[str, nn.Module]]] = {}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and not is_kept(path):
            child, dot, _ = path.partition(".")
            groups.setdefault(child if dot else "", []).append((path, module))
    found = []
    for child, modules in groups.items():
        mixer = _mixer(block, name, index, child, modules, config, mixes_tokens)
        if mixer is not None:
            found.append(mixer)
    check_complete(found, name, skipped)
    return tuple(sorted(_with_shared(found), key=lambda mixer: ORDER.index(mixer.kind)))


def _with_shared(mixers: Sequence[Mixer]) -> list[Mixer]:
    """The mixers, with an MLP beside a mixture of experts as one of its shared experts (GraniteMoeHybrid)."""
    beside = [mixer for mixer in mixers if mixer.kind == "mlp"]
    mixed = [mixer for mixer in mixers if mixer.mixture is not None]
    if len(beside) != 1 or len(mixed) != 1:
        return list(mixers)
    linears = (replace(x, sublayer="experts") for x in beside[0].linears)
    whole = replace(mixed[0], linears=(*mixed[0].linears, *linears), channels=beside[0].channels)
    return [whole if x is mixed[0] else x for x in mixers if x is not beside[0]]


def is_kept(path: str) -> bool:
    """True for a projection that is kept on purpose: that of the step size of a state-space model."""
    return path.rpartition(".")[2].startswith("dt_")


def is_mixture(module: nn.Module) -> bool:
    """True for a module with a list of modules in it, or with tensors that hold a matrix for each expert."""
    lists = [inner for inner in module.modules() if isinstance(inner, nn.ModuleList)]
    matrices = any(parameter.ndim > 1 for inner in lists for parameter in inner.parameters())
    return matrices or any(parameter.ndim == 3 for parameter in module.parameters())


def _mixer(
    block: nn.Module,
    name: str,
    index: int,
    child: str,
    modules: Sequence[tuple[str, nn.Module]],
    config: Any,
    mixes_tokens: MixesTokens,
) -> Mixer | None:
    owner = block.get_submodule(child) if child else block
    attends = "attention" in type(owner).__name__.lower()

    def linears(kind: Sublayer, roles: Sequence[Role]) -> tuple[Linear, ...]:
        made = (
            Linear(f"{name}.{path}", module, role, kind, index, isinstance(module, Conv1D))
            for (path, module), role in zip(modules, roles, strict=True)
        )
        return tuple(sorted(made, key=lambda linear: get_args(Role).index(linear.role)))

    if child and any(isinstance(module, nn.Conv1d) for module in owner.modules()):
        return Mixer("recurrent", linears("recurrent", _inner(modules)))
    if child and is_mixture(owner):
        return _experts(block, name, index, child, modules)
    told = roles_of(modules, name, attends=attends)
    if told is not None:
        kind, roles = told
        if kind == "mlp":
            return _mlp(linears(kind, roles), config, name)
        found = _attention(linears(kind, roles), config, name)
        return replace(found, vectors=_vectors(found, owner, f"{name}.{child}", index))
    if child and (attends or mixes_tokens(owner)):
        kind = "attention" if attends else "recurrent"
        return _latent(linears(kind, _inner(modules)), kind, config)
    return None


def _inner(modules: Sequence[tuple[str, nn.Module]]) -> list[Role]:
    """Roles where nothing but the output projection is told apart: it is the last one."""
    named = [path.rpartition(".")[2] for path, _ in modules]
    last = next((i for i, path in enumerate(named) if path.startswith(("out", "o_"))), len(named) - 1)
    return ["o" if i == last else "in" for i in range(len(modules))]


def _experts(
    block: nn.Module, name: str, index: int, child: str, modules: Sequence[tuple[str, nn.Module]]
) -> Mixer:
    """Projections of routed and shared experts by their names; whatever else is there routes."""
    owner = block.get_submodule(child)
    split = any(isinstance(module, Experts) for module in owner.modules())
    known = [
        (path, module, roles_of([(path, module)], name, attends=False, partly=True))
        for path, module in modules
    ]
    linears = tuple(
        Linear(f"{name}.{path}", module, told[1][0], "experts", index, False, _expert_of(block, path))
        for path, module, told in known
        if told is not None and told[0] == "mlp"
    )
    shared = [linear.in_features for linear in linears if linear.expert is None and linear.is_output]
    return Mixer(
        "experts",
        linears,
        channels=shared[0] if len(shared) == 1 else 0,
        mixture=find_mixture(owner, f"{name}.{child}") if split else None,
    )


def _expert_of(block: nn.Module, path: str) -> Expert | None:
    owner = block.get_submodule(path.rpartition(".")[0])
    return owner if isinstance(owner, Expert) else None


def _attention(linears: tuple[Linear, ...], config: Any, name: str) -> Mixer:
    """Attention of q, k, v and o. Its heads are those of the config, their width follows from the shapes."""
    by_role = {linear.role: linear for linear in linears}
    n_heads, output = config.num_attention_heads, by_role["o"]
    width = output.in_features // n_heads
    fused = by_role.get("qkv")
    if fused is None:
        query, kv = by_role["q"].out_features, by_role.get("v", by_role["k"]).out_features
    else:
        query, kv = output.in_features, (fused.out_features - output.in_features) // 2
    asked = getattr(config, "num_key_value_heads", None)
    n_kv = kv // width if width else 0
    if fused is None and by_role["k"].out_features != kv and asked:
        n_kv, kv = asked, asked * width
    if query == 2 * output.in_features:  # the queries' projection gives a gate, too
        heads = Heads(n_heads, n_kv, width, query_rows=2 * width) if fused is None and n_kv else None
        return Mixer("attention", linears, heads, 0, 2 * output.in_features, 2 * kv)
    _check_shapes(
        linears,
        {
            "q": (n_heads * width, None),
            "k": (n_kv * width, None),
            "v": (n_kv * width, None),
            "qkv": ((n_heads + 2 * n_kv) * width, None),
            "o": (output.out_features, n_heads * width),
        },
        name,
    )
    return Mixer("attention", linears, Heads(n_heads, n_kv, width), 0, 2 * n_heads * width, 2 * n_kv * width)


def _vectors(mixer: Mixer, owner: nn.Module, name: str, index: int) -> tuple[HeadVector, ...]:
    """Vectors of the attention's module itself with a number for each query head."""
    n_heads = 0 if mixer.heads is None else mixer.heads.n_queries
    return tuple(
        HeadVector(f"{name}.{own}", owner, "in", "attention", index, False)
        for own, parameter in owner.named_parameters(recurse=False)
        if parameter.shape == (n_heads,)
    )


def _mlp(linears: tuple[Linear, ...], config: Any, name: str) -> Mixer:
    width = linears[-1].in_features
    _check_shapes(
        linears,
        {"gate": (width, None), "up": (width, None), "gate_up": (2 * width, None), "down": (None, width)},
        name,
    )
    return Mixer("mlp", linears, channels=width)


def _latent(linears: tuple[Linear, ...], kind: Sublayer, config: Any) -> Mixer:
    """A mixer of other projections: a recurrent one, or latent attention, which caches keys and values of all heads.

    Heads of the latter (DeepSeek-V2, arXiv 2405.04434, section 2.1) are rows of the projections from the latent states
    and columns of the output projection; the projections to those states have none.
    """
    if kind != "attention":
        return Mixer(kind, linears)
    queries, kv = (_by_prefix(linears, x) for x in (("q_b", "q_proj"), ("kv_b",)))
    values, n_heads = linears[-1].in_features, config.num_attention_heads
    n_rows = queries.out_features if queries else values
    heads = None
    if queries and kv and all(x % n_heads == 0 for x in (n_rows, kv.out_features, values)):
        roles: dict[str, Role] = {queries.name: "q", kv.name: "kv"}
        linears = tuple(replace(x, role=roles.get(x.name, x.role)) for x in linears)
        heads = Heads(n_heads, n_heads, values // n_heads, n_rows // n_heads, kv.out_features // n_heads)
    return Mixer(kind, linears, heads, 0, n_rows + values, n_rows + values)


def _by_prefix(linears: Sequence[Linear], prefixes: tuple[str, ...]) -> Linear | None:
    """The one projection whose name begins so."""
    found = [x for x in linears if x.name.rpartition(".")[2].startswith(prefixes)]
    return found[0] if len(found) == 1 else None


def _check_shapes(
    linears: Sequence[Linear], wanted: dict[Role, tuple[int | None, int | None]], name: str
) -> None:
    width = linears[-1].out_features
    for linear in linears:
        out_features, in_features = wanted[linear.role]
        out_features = width if out_features is None else out_features
        in_features = width if in_features is None else in_features
        if tuple(linear.weight.shape) != (out_features, in_features):
            raise ValueError(
                f"Expected the {linear.role} projection to be {out_features} x {in_features} (out x in, from the "
                f"config's heads and widths), got {linear.out_features} x {linear.in_features} [at {linear.name}]."
            )
