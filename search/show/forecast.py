"""Forecasts in words: a few lines before a command, a table for `plan`, and forecast beside truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.search.show.values import duration, scaled
from secateur.spaces.forecast import Forecast, Holding, Where

PLACES: Mapping[Where, str] = {"host": "memory", "device": "device memory", "disk": "disk"}
N_NAMED = 2
"""Largest holdings that a short line names."""


def size(n_bytes: float) -> str:
    """Bytes with three digits and a unit."""
    return scaled(float(f"{n_bytes:.3g}"), "B")


def heading(forecast: Forecast) -> str:
    """The model and the command in one line."""
    of = forecast.subject
    more = [f"{name} {of[name]}" for name in ("space", "controller", "recipe", "method") if of.get(name)]
    return (
        f"{of['model']}: {of['family']}, {of['blocks']} blocks, {scaled(of['parameters'])} parameters in {of['dtype']} "
        f"on {forecast.device}" + "".join(f", {x}" for x in more)
    )


def place_lines(forecast: Forecast) -> dict[str, str]:
    """The peak of each place by name, with the free bytes and the largest holdings."""
    lines = {}
    for where, name in PLACES.items():
        n_bytes, phase = forecast.peak(where)
        if n_bytes:
            free = forecast.room.get(where)
            held = ", ".join(f"{x.name} {size(x.all_bytes)}" for x in forecast.held(where, phase)[:N_NAMED])
            of_free = "" if free is None else f" of {size(free)} free"
            lines[name] = f"{size(n_bytes)}{of_free}, in the phase {phase}: {held}, ..."
    return lines


def time_line(forecast: Forecast) -> str:
    """The time of all steps, or of those that were timed."""
    known = [x.seconds for x in forecast.work if x.seconds is not None]
    if not known:
        return f"not timed; {forecast.tokens:,} tokens"
    left = "" if len(known) == len(forecast.work) else ", without what was not timed"
    return f"about {duration(sum(known))}{left}, {forecast.tokens:,} tokens"


def short_lines(forecast: Forecast) -> list[str]:
    """A line for each place and one for the time, before a command."""
    lines = [f"forecast: {name} {line}" for name, line in place_lines(forecast).items()]
    return [*lines, f"forecast: {time_line(forecast)} (`secateur plan` shows all)"]


def full_lines(forecast: Forecast) -> list[str]:
    """All holdings and steps, for people."""
    lines = [heading(forecast)]
    for where, name in PLACES.items():
        n_bytes, phase = forecast.peak(where)
        if not n_bytes:
            continue
        free = forecast.room.get(where)
        of_free = "" if free is None else f", {size(free)} free"
        lines += ["", f"{name}: {size(n_bytes)} at most, in the phase {phase}{of_free}"]
        lines += [f"  {_row(x)}" for x in forecast.held(where, phase)]
    if forecast.streamed is not None:
        streamed = [
            f"{name} {line}" for name, line in place_lines(forecast.streamed).items() if name != "disk"
        ]
        lines += ["", f"with `stream: always`: {'; '.join(streamed)}"]
    lines += ["", f"time: {time_line(forecast)}"]
    for x in forecast.work:
        seconds = "not timed" if x.seconds is None else duration(x.seconds)
        lines.append(
            f"  {seconds:>10}  {x.name}{_beside(x.tokens and f'{x.tokens:,} tokens', x.why, x.setting)}"
        )
    if forecast.calibrated:
        lines.append(f"  calibrated on {forecast.calibrated}")
    return [*lines, *(f"note: {note}" for note in forecast.notes)]


def _row(held: Holding) -> str:
    copies = f"{held.copies} x {size(held.n_bytes)}" if held.copies > 1 else ""
    return f"{size(held.all_bytes):>10}  {held.name}{_beside(copies, held.why, held.setting)}"


def _beside(*parts: Any) -> str:
    """Facts in brackets, the last one as what changes them."""
    *facts, setting = [str(x) for x in parts if x] if parts[-1] else [*(str(x) for x in parts if x), ""]
    text = "; ".join([*facts, f"see {setting}"] if setting else facts)
    return f" ({text})" if text else ""


def remedy(forecast: Forecast, where: Where, needed: int, free: int) -> str:
    """What would fit, in words."""
    excess, phase = needed - free, forecast.peak(where)[1]
    found: list[str] = []
    if forecast.streamed is not None and forecast.streamed.too_large() is None:
        found.append(f"`stream: always` ({size(forecast.streamed.peak(where, needed=True)[0])})")
    for x in forecast.held(where, phase):
        if x.name == "weights" and forecast.subject.get("dtype") == "float32" and excess <= x.all_bytes / 2:
            found.append("`dtype: bfloat16`")
        elif x.setting and x.name != "weights" and excess < x.all_bytes:
            share = 1 - excess / x.all_bytes
            found.append(f"{x.name} of {share:.0%} of its size (`{x.setting}`)")
    if any(x.copies > 1 for x in forecast.held(where, phase)):
        found.append("fewer workers (`executor.workers`)")
    if not found:
        return f"Nothing of it can be made that much smaller: {size(needed)} of room would do"
    return "It would fit with " + ", or with ".join(found[:3])


def truth_line(forecast: Mapping[str, Any], truth: Mapping[str, Any]) -> str:
    """Forecast beside truth in one line, from a run's record."""
    parts = []
    for name, foreseen, key in (("memory", "driver", "driver"), ("disk", "left", "disk")):
        parts.append(f"{name} {size(forecast[foreseen])}, measured {size(truth[key])}")
    seconds = "not timed" if forecast["seconds"] is None else duration(forecast["seconds"])
    parts.append(f"time {seconds}, measured {duration(truth['seconds'])}")
    return "; ".join(parts)


def facts(forecast: Forecast) -> dict[str, str]:
    """Lines by name, for tables."""
    rows: Sequence[tuple[str, str]] = [("model", heading(forecast)), *place_lines(forecast).items()]
    return {**dict(rows), "time": time_line(forecast)}


def refusal(forecast: Forecast) -> str | None:
    """One line about what does not fit, and what would; None if all does."""
    found = forecast.too_large()
    if found is None:
        return None
    where, needed, free = found
    return (
        f"Expected room for {size(needed)} in the {PLACES[where]}, got {size(free)} free. "
        f"{remedy(forecast, where, needed, free)}."
    )
