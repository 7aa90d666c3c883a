"""Export formats of structured models, with the families that each can carry.

A new one is a new file and a row here, or an entry point of the group ``secateur.formats``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.pruners.export import gguf_file
from secateur.pruners.export.cut import CutModel, Job, Saved
from secateur.pruners.export.hf import any_form, padded_form, save_hf, stock_form
from secateur.pruners.export.padded import check_padded
from secateur.spaces.plugins import Registry, Row

ANY = "any"
"""As `target_format`: no restriction."""


@dataclass(frozen=True)
class FormatRow(Row):
    """An export format.

    Args:
        summary: for people, one line.
        families: the values of `model_type` that it can carry; None for all that have an anatomy.
        check: refuses a planned model that it can't carry, before any work: (model, tokenizer).
        save: writes a model into an empty directory and checks it: (job, directory, scratch directory).
        source: address of its description.
    """

    summary: str
    families: tuple[str, ...] | None
    check: Callable[[CutModel, PreTrainedTokenizerBase], object]
    save: Callable[[Job, Path, Path], Saved]
    source: str = ""


FORMATS: Registry[FormatRow] = Registry(
    "secateur.formats",
    FormatRow,
    {
        "hf": FormatRow(
            "safetensors: stock class and config if the blocks have one shape, else with one file of code",
            None,
            lambda cut, tokenizer: any_form(cut, ""),
            partial(save_hf, any_form),
            "https://github.com/huggingface/transformers/pull/45333",
        ),
        "hf-stock": FormatRow(
            "safetensors with a stock class and config: blocks of one shape, or whole blocks dropped",
            None,
            lambda cut, tokenizer: stock_form(cut, ""),
            partial(save_hf, stock_form),
        ),
        "hf-padded": FormatRow(
            "safetensors in the parent's shapes, zeros where something went: no size or speed gain",
            None,
            lambda cut, tokenizer: check_padded(cut),
            partial(save_hf, padded_form),
        ),
        "gguf": FormatRow(
            "for llama.cpp: arch deci, or llama if the blocks have one shape",
            gguf_file.FAMILIES,
            gguf_file.check_config,
            gguf_file.save_gguf,
            "https://github.com/ggml-org/ggml/blob/master/docs/gguf.md",
        ),
    },
)


def check_config(name: str | None, config: Any) -> None:
    """Raise a ValueError if `name` is a format that can't carry the family of a config of transformers."""
    if name is not None and name in FORMATS:
        check_format(config.model_type, name)


def check_format(family: str, name: str) -> None:
    """Raise a ValueError unless `name` is `ANY`, or a format that can carry the family."""
    if name != ANY and name not in FORMATS:
        raise ValueError(f"Expected a format ({', '.join(FORMATS)} or {ANY}), got {name!r}.")
    families = None if name == ANY else FORMATS[name].families
    if families is None or family in families:
        return
    others = ", ".join(
        other for other, row in FORMATS.items() if row.families is None or family in row.families
    )
    raise ValueError(
        f"Expected a family that the format {name} can carry ({', '.join(families)}), got {family!r}. "
        f"For this one choose among {others}."
    )
