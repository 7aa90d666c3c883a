"""Options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any

import typer

Option = tuple[Any, Any]  # annotation for typer, and default

# How a model is loaded.
LOADING: dict[str, Option] = {
    "dtype": (Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")], "auto"),
    "device": (Annotated[str, typer.Option(help="auto, cpu, cuda, ...")], "auto"),
    "trust_remote_code": (
        Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's code.")],
        False,
    ),
}

# What a model is measured on.
MEASURING: dict[str, Option] = {
    "text": (Annotated[str, typer.Option(help="docs, a file, a directory or a hub data set.")], "docs"),
    "tokens": (Annotated[int, typer.Option(help="A multiple of the window.")], 8192),
    "window": (Annotated[int, typer.Option(help="Tokens that the model sees at once.")], 512),
}

# Under which conditions latencies are measured.
CONDITIONS: dict[str, Option] = {
    "batch": (Annotated[int, typer.Option(help="Sequences at a time.")], 1),
    "prompt": (
        Annotated[int, typer.Option(help="Tokens of each: computed in prefill, cached in decode.")],
        512,
    ),
    "threads": (Annotated[int | None, typer.Option(help="On a CPU; default: all.")], None),
    "clock": (Annotated[str, typer.Option(help="wall, or cpu on a machine with other work.")], "wall"),
}


def with_group(
    argument: str, group: Mapping[str, Option]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options; their values come in one argument, a mapping with the group's keys."""

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
