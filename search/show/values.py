"""Numbers as text, with significant digits and units."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence

from secateur.spaces.measurement import perplexity_of


def perplexity(values: Mapping[str, float]) -> float | None:
    """``exp(ce)``, or None where there is no ce."""
    return perplexity_of(values["ce"]) if "ce" in values else None


def shown(name: str, value: float | None, absent: str = "") -> str:
    """Text of a value in the unit of its name, e.g. of an objective; `absent` for None."""
    return absent if value is None else _FORMATS.get(re.split("[:@]", name)[0], _plain)(value)


def one_line(values: Mapping[str, float]) -> str:
    """Text of values and of their perplexity, e.g. ``loss 0.1235, perplexity 27.12``."""
    texts = [f"{name} {shown(name, value)}" for name, value in values.items()]
    ppl = perplexity(values)
    return ", ".join(texts if ppl is None else [*texts, f"perplexity {shown('ppl', ppl)}"])


def _plain(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"


def scaled(value: float, unit: str = "") -> str:
    """Text with four digits and a decimal prefix, e.g. ``4.215 M``."""
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}".strip()


def spread(values: Sequence[float], form: str = ".4g") -> str:
    """Text of median and range, e.g. ``2.5 (2 to 3)``, in a format of `format`; of a single value; a dash for none."""
    if not values:
        return "–"
    text = f"{statistics.median(values):{form}}"
    return text if len(values) == 1 else f"{text} ({min(values):{form}} to {max(values):{form}})"


def duration(seconds: float) -> str:
    """Text of hours, minutes and seconds, e.g. ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


_FORMATS: dict[str, Callable[[float], str]] = {
    "nodes": lambda value: f"{value:.0f}",
    "sparsity": lambda value: f"{value:.1%}",
    "params": scaled,
    "macs": scaled,
    "size_bytes": lambda value: scaled(value, "B"),
    "kv_bytes": lambda value: scaled(value, "B"),
    "latency_prefill": lambda value: f"{value:.4g} ms",
    "latency_decode": lambda value: f"{value:.4g} ms",
    "acceptance": lambda value: f"{value:.2%}",
    "task": lambda value: f"{value:.1%}",
    "ppl": lambda value: f"{value:.2f}" if value < 1e5 else f"{value:.3g}",
}
