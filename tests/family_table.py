"""Table of families: what each can be pruned by.

    python -m tests.family_table

prints that of docs/reference/families.md, which `test_all_families` holds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from secateur.pruners.export.stock import stock_hidden
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import BlockLayout, MixtureLayout
from secateur.pruners.models.stream_axes import stream_axes
from tests.families import FAMILIES, make
from tests.family_configs import REFUSED

FEWER_HEADS = (
    "stablelm",
    "stablelm, parallel",
    "helium",
    "gpt_neo",
    "gpt_neox",
    "falcon",
    "falcon, new",
    "persimmon",
    "opt",
    "gpt2",
    "gptj",
)
"""Families whose stock class takes the width of a head from those of the stream and of all heads."""

WHOLE_GROUPS = ("gpt_bigcode",)
"""Families with grouped queries whose attention takes their number from the width of the stream."""

_INNER = "mixers whose inner width follows the hidden width"
_HEADS = "the width of all heads follows it"
NO_WIDTHS = {
    "gemma3 with images": "another tower, which writes into the stream of the language tower",
    "opt, norms behind": "no norm behind the last block",
    "bloom": "a norm behind the embedding",
    **dict.fromkeys(("lfm2", "lfm2_moe", "xlstm"), _INNER),
    **dict.fromkeys(("bitnet", "gpt_bigcode", "mpt", "recurrent_gemma", "olmoe"), _HEADS),
}
"""Families whose hidden width can't be cut, with the reason."""

HALF_WIDTHS = ("mamba2", "bamba", "jamba", "granitemoehybrid", "granitemoehybrid, dense")
"""Families whose configs give the inner width of recurrent mixers as a whole multiple of the hidden one."""

HELD_WIDTHS = tuple(name for name in FAMILIES if name not in (*NO_WIDTHS, *FEWER_HEADS))
"""Families whose stock class holds fewer hidden channels with heads of the same width."""

WHOLE = {
    "attention": "attention, whose heads depend on each other,",
    "recurrent": "recurrent mixers",
    "mlp": "MLPs, whose channels depend on each other,",
}
"""Words for mixers and MLPs that are kept or removed as a whole, by kind."""

BY_PLACE = ("bloom", "mpt")
"""Families whose heads weigh distances by slopes that follow from their places and number (ALiBi)."""

WHY = {
    "other logits than the model's": "refused: more than modules, a factor and a soft cap between blocks and logits",
    "output projections that are understood": "refused: experts in attention, whose queries a router chooses",
    "which share": "refused: blocks share weights",
    r"got q\+o": "refused: blocks read the keys of others",
}
"""Reasons in words, by what errors match."""

HEADER = """| family | blocks | weights: allocation, formula, recipes | units: architecture, recipes | experts | \
query heads | hidden width |
|---|---|---|---|---|---|---|"""


def row(name: str, anatomy: Anatomy | None) -> str:
    """Line of the table; None for an anatomy that is refused."""
    kind, _, refusal = (FAMILIES | REFUSED)[name]
    family = f"{name} (`{kind}`)"
    if anatomy is None:
        return f"| {family} | | {WHY[refusal]} | refused | refused | refused | refused |"
    blocks = dict.fromkeys(" + ".join(mixer.kind for mixer in block.mixers) for block in anatomy.blocks)
    if refusal:
        units, further = WHY[refusal], "refused | refused | refused"
    else:
        layouts = find_layouts(anatomy, experts=True)
        units = _units(anatomy, layouts)
        further = f"{_experts(layouts)} | {_query_heads(name, layouts)} | {_hidden(anatomy, layouts)}"
    return f"| {family} | {'; '.join(blocks)} | works | {units} | {further} |"


def _units(anatomy: Anatomy, layouts: Sequence[BlockLayout]) -> str:
    """Units that can be cut, and parts that are kept or removed as a whole."""
    whole = {
        part.output.sublayer
        for layout in layouts
        for part in layout.parts
        if part.kind != "experts" and part.rigid
    }
    kinds = [WHOLE[kind] for kind in WHOLE if kind in whole]
    if anatomy.family in BY_PLACE:
        kinds = ["attention, whose heads depend on their places (ALiBi),"]
    return f"works; {' and '.join(kinds)} as a whole" if kinds else "works"


def _query_heads(name: str, layouts: Sequence[BlockLayout]) -> str:
    attentions = [x.attention for x in layouts if x.attention and x.block.mixer("attention")]
    if not attentions:
        return "refused: no attention"
    if not any(x.splits for x in attentions) and name not in WHOLE_GROUPS:
        if any(x.rigid for x in attentions):
            return "refused: no heads that are independent"
        return "refused: each has a KV head of its own"
    return "refused: their number follows the hidden width" if name in WHOLE_GROUPS else "works"


def _hidden(anatomy: Anatomy, layouts: Sequence[BlockLayout]) -> str:
    try:
        stream_axes(anatomy)
    except ValueError as error:
        return f"refused: {str(error).partition(' with ')[2].removesuffix('.')}"
    splits = any(x.attention and x.attention.splits for x in layouts)
    if stock_hidden(anatomy, anatomy.width // 4 * 3, groups=False, queries=False):
        return "works"
    half = anatomy.width // 2
    if stock_hidden(anatomy, half, groups=False, queries=False):
        return "half of it alone: the inner width of recurrent mixers is a whole multiple"
    if stock_hidden(anatomy, half, groups=True, queries=splits):
        return "beside fewer heads alone: their width follows it"
    return f"refused: {_HEADS}"


def _experts(layouts: Sequence[BlockLayout]) -> str:
    """Parts of mixtures that can be cut."""
    mixtures = [x.mlp for x in layouts if isinstance(x.mlp, MixtureLayout)]
    if not mixtures:
        return ""
    groups = max(x.mixture.n_groups for x in mixtures)
    limited = f" (as many of each of {groups} groups)" if groups > 1 else ""
    shared = "; channels of shared ones" if any(x.shared for x in mixtures) else ""
    return f"numbers{limited} and channels{shared}"


if __name__ == "__main__":
    rows = [row(each, dissect(make(each))) for each in FAMILIES] + [row(each, None) for each in REFUSED]
    sys.stdout.write("\n".join([HEADER, *rows, ""]))
