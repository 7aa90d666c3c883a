"""Plans as Python sees them: what a command will take, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from secateur.api.commands import raw_settings, silent
from secateur.api.tables import html
from secateur.search.show.forecast import facts, full_lines, heading, refusal
from secateur.spaces.forecast import Forecast

Say = Callable[[str], None]


class Plan:
    """Forecast of a search or a pruning.

    Attributes:
        forecast: all that is held, and all work, as plain values.
    """

    def __init__(self, forecast: Forecast) -> None:
        self.forecast = forecast

    @property
    def memory_bytes(self) -> int:
        """Peak of the host's memory, in bytes."""
        return self.forecast.peak("host")[0]

    @property
    def device_bytes(self) -> int:
        """Peak of the device's memory, in bytes; 0 on a CPU."""
        return self.forecast.peak("device")[0]

    @property
    def disk_bytes(self) -> int:
        """Peak of what is written, in bytes."""
        return self.forecast.peak("disk")[0]

    @property
    def seconds(self) -> float | None:
        """Time of all steps; None if one was not timed."""
        return self.forecast.seconds

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return self.forecast.tokens

    @property
    def problem(self) -> str | None:
        """Line that names the memory or disk that is missing, and settings that would fit; None if all fits."""
        return refusal(self.forecast)

    @property
    def lines(self) -> list[str]:
        """All of it, as ``secateur plan`` prints it."""
        return full_lines(self.forecast)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as ``secateur plan --json`` prints them."""
        return self.forecast.to_json()

    def __repr__(self) -> str:
        found = facts(self.forecast)
        rest = "; ".join(f"{name} {line}" for name, line in found.items() if name != "model")
        return f"<plan of {heading(self.forecast)}: {rest}>"

    def _repr_html_(self) -> str:
        return html("plan", facts(self.forecast))


def plan(
    subject: str | Path | Mapping[str, Any] | None = None,
    *,
    prune: str | None = None,
    sparsity: float = 0.5,
    device: str | None = None,
    time: bool = True,
    say: Say = silent,
    **sections: Any,
) -> Plan:
    """Forecast of memory, disk, tokens and time, from a model's config.json; its weights are not needed.

    Args:
        subject: a settings file, a model, or a mapping as for `search`; None: settings at their defaults.
        prune: plan `prune` of the model by this recipe, in place of a search.
        sparsity: share that it removes.
        device: devices that are only thought of, such as ``cuda:141GB``.
        time: time a block of this shape for about a second.
        say: given progress, one line at a time.
        sections: further settings, as for `search`.

    Raises:
        UsageError: if the settings don't fit the config.
    """
    from secateur.search.app.forecasting import planned
    from secateur.search.settings.settings import settings_from

    if isinstance(subject, str | Path) and not str(subject).endswith((".yaml", ".yml")):
        sections, subject = {"model": str(subject), **sections}, None
    settings = settings_from(raw_settings(subject, sections))
    return Plan(planned(settings, prune, sparsity, device, timing=time, say=say))
