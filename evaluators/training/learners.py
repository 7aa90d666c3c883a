"""What learns: the parameters of each method, and what is to be done with them in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from secateur.evaluators.training.recipe import Method, Recipe
from secateur.pruners.models.anatomy import Anatomy

Finish = Callable[[], None]


def _nothing() -> None:
    """The weights are in place already."""


def _full(anatomy: Anatomy, recipe: Recipe) -> Finish:
    anatomy.model.requires_grad_(True)
    return _nothing


def _norms(anatomy: Anatomy, recipe: Recipe) -> Finish:
    names = [name for block in anatomy.blocks for name in block.norms]
    for name in filter(None, [*names, anatomy.final_norm]):
        anatomy.model.get_submodule(name).requires_grad_(True)
    return _nothing


def _lora(anatomy: Anatomy, recipe: Recipe) -> Finish:
    from secateur.evaluators.training.lora import attach_lora

    model = attach_lora(anatomy, recipe.rank, recipe.seed)

    def finish() -> None:
        model.merge_and_unload()

    return finish


METHODS: Mapping[Method, Callable[[Anatomy, Recipe], Finish]] = MappingProxyType(
    {"full": _full, "norms": _norms, "lora": _lora}
)


def let_learn(anatomy: Anatomy, recipe: Recipe) -> tuple[dict[str, nn.Parameter], Finish]:
    """Mark the parameters that the recipe's method trains, and no others.

    Returns:
        They by name, tied ones once; and what writes them into the model's own weights after training.
    """
    anatomy.model.requires_grad_(False)
    finish = METHODS[recipe.method](anatomy, recipe)
    named = anatomy.model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}, finish
