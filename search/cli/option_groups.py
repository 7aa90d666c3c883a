"""Arguments and options of several commands, and the choice of a trial by them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from secateur.search.errors import UsageError
from secateur.search.objectives import objective
from secateur.search.results.pick import BOUND_KINDS, parse_bounds

if TYPE_CHECKING:
    from secateur.search.controller import Trial
    from secateur.search.results.run import Run


MODEL_HELP = "tiny, a hub id, a directory or a .gguf file."

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]
TrialNumber = Annotated[
    int | None, typer.Argument(metavar="TRIAL", help="Number of a trial, in place of bounds.")
]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
NewDir = Annotated[Path, typer.Option(metavar="DIR", help="New or empty directory for the model.")]
ExportFormat = Annotated[
    str | None,
    typer.Option("--format", help="See `secateur list formats`; default: as set, or the usual one."),
]
Anyway = Annotated[
    bool, typer.Option("--anyway", help="Go on where the forecast says that memory or disk do not suffice.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def completing(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completion of a word in a shell by names, which are looked up when a shell asks."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


Option = tuple[Any, Any]  # annotation for typer, and default
Options = dict[str, Any]  # values of a group

# Loading of a model.
LOADING: dict[str, Option] = {
    "dtype": (Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")], "auto"),
    "device": (Annotated[str, typer.Option(help="auto, cpu, cuda, ...")], "auto"),
    "trust_remote_code": (
        Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the model and tasks.")],
        False,
    ),
}

# Streaming of a model, beside its loading.
STREAMING: dict[str, Option] = {
    "stream": (
        Annotated[
            str,
            typer.Option(
                metavar="auto|always|never",
                help="Block by block from the files; auto: where the model is large beside the free memory.",
            ),
        ],
        "auto",
    ),
}

# Text to measure a model on.
MEASURING: dict[str, Option] = {
    "text": (Annotated[str, typer.Option(help="docs, a file, a directory or a hub data set.")], "docs"),
    "tokens": (Annotated[int, typer.Option(help="Tokens in all, a multiple of the window.")], 8192),
    "window": (Annotated[int, typer.Option(help="Tokens in the model's context.")], 512),
    "allow_long_windows": (
        Annotated[
            bool,
            typer.Option("--allow-long-windows", help="Windows longer than the model's rotary positions."),
        ],
        False,
    ),
    "bos": (
        Annotated[
            str,
            typer.Option(
                metavar="auto|true|false",
                help="Begin windows with the BOS token; auto: where the tokenizer does so by itself.",
            ),
        ],
        "auto",
    ),
}

# Conditions of latency measurements.
CONDITIONS: dict[str, Option] = {
    "batch": (
        Annotated[str, typer.Option(metavar="N,...", help="Sequences in a batch; several sizes by commas.")],
        "1",
    ),
    "prompt": (
        Annotated[int, typer.Option(help="Tokens of each sequence: computed in prefill, cached in decode.")],
        512,
    ),
    "threads": (Annotated[int | None, typer.Option(help="CPU threads; default: all.")], None),
    "clock": (Annotated[str, typer.Option(help="wall, or cpu on a machine with other work.")], "wall"),
    "eager": (
        Annotated[bool, typer.Option("--eager", help="On CUDA, decode steps without CUDA graphs.")],
        False,
    ),
}


def bos_asked(text: str) -> bool | Literal["auto"]:
    """The value of `--bos`.

    Raises:
        UsageError: if it is another.
    """
    values: dict[str, bool | Literal["auto"]] = {"auto": "auto", "true": True, "false": False}
    if text not in values:
        raise UsageError(f"Expected `--bos` auto, true or false, got {text!r}.")
    return values[text]


def with_group(
    argument: str, group: Mapping[str, Option]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: these options; their values are one argument of the command, a mapping with the group's keys."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def wrapped(**values: Any) -> None:
            mine = {key: values.pop(_parameter(key)) for key in group}
            command(**values, **{argument: mine})

        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != argument]
        options = [
            inspect.Parameter(
                _parameter(key), inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
            for key, (annotation, default) in group.items()
        ]
        parameters = [*own, *options]
        wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapped

    return decorate


def _parameter(key: str) -> str:
    return key.replace("-", "_")


Bounds = Mapping[str, str | None]


def with_bounds(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: an option for each of `BOUND_KINDS`; their texts by name are the command's argument ``bounds``."""
    return with_group("bounds", {name: (_option(name), None) for name in BOUND_KINDS})(command)


def with_limits(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: as `with_bounds`, the upper limits on a whole model alone, as the argument ``limits``."""
    kinds = [name for name, kind in BOUND_KINDS.items() if not kind.at_least]
    return with_group("limits", {name: (_option(name), None) for name in kinds})(command)


def _option(name: str) -> Any:
    kind = BOUND_KINDS[name]
    side, relative = ("Lower", "") if kind.at_least else ("Upper", ", or 0.7x of the dense model's")
    at = f"; {kind.example}@8 at a batch size" if kind.has_batch else ""
    text = f"{side} limit on {objective(kind.value).label}, e.g. {kind.example}{relative}{at}."
    return Annotated[str | None, typer.Option(f"--{name}", help=text)]


def choose(run: Run, number: int | None, bounds: Bounds) -> Trial:
    """The trial with this number, or the best one within the bounds.

    Raises:
        UsageError: if neither or both are given, or no trial fits.
    """
    if number is None:
        return run.pick(parse_bounds(bounds))
    if any(text is not None for text in bounds.values()):
        raise UsageError("Expected a trial's number or bounds, got both. Leave one out.")
    return run.pick(number=number)
