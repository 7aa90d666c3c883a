"""Description of a search in its directory: identity with content hashes, baselines, sizes, versions and texts."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.pruners.export.registry import FORMATS
from secateur.search.app.method_sources import method_sources, recorded_sources, texts_in
from secateur.search.app.session import usage_errors
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.executors.registry import EXECUTORS
from secateur.search.settings.settings import Settings, identity, resolved
from secateur.search.study.about import ABOUT, About, read_about
from secateur.spaces.method_table import METHODS
from secateur.spaces.registry import SPACES

if TYPE_CHECKING:
    from secateur.evaluators.session import Session


@usage_errors()
def about_of(settings: Settings, session: Session, of_plugins: dict[str, str], directory: Path) -> About:
    """Description of a search.

    Args:
        settings: of the search.
        session: with its model and data.
        of_plugins: `plugin_versions`.
        directory: of the run; one from before sources of methods were recorded goes on without.

    Raises:
        UsageError: if something in the settings does not fit a further model.
    """
    from secateur.evaluators.data.text import calibration_address
    from secateur.pruners.models.account import account, zeros_of

    plan, starved = session.plan, session.starved_experts()
    content = session.facts() | session.facts_of_others()
    if (directory / ABOUT).is_file():
        content |= recorded_sources(settings, read_about(directory))
    else:
        content |= method_sources(settings)
    shape = {"linears": [asdict(linear) for linear in session.prunables], **session.dense.shape.to_json()}
    versions = {name: metadata.version(name) for name in ("torch", "transformers")} | of_plugins
    sources = {name: text.source for name, text in session.sources.items()}
    if not sources:
        sources = {"calibration": calibration_address(plan.calibration, plan.search, plan.test)}
    return About(
        identity=identity(settings) | {"content": content},
        baselines=baselines_of(session),
        facts={
            "shape": shape,
            "versions": versions,
            "host": platform.node(),
            "sources": sources,
            "parameters": [asdict(row) for row in account(session.anatomy)],
            "zeros": zeros_of(session.anatomy),
            **({"starved_experts": starved} if starved else {}),
            "folders": [str(folder) for folder in settings.folders],
        },
    )


def baselines_of(session: Session) -> dict[str, str]:
    """Canonical texts of the baselines by name."""
    return {name: candidate.text for name, candidate in session.space.baselines().items()}


def plugin_versions(settings: Settings) -> dict[str, str]:
    """Versions, by distribution, of the packages with parts that the settings name."""
    rows = [
        SPACES[settings.space.kind],
        CONTROLLERS[settings.controller.kind],
        EXECUTORS[settings.executor.kind],
    ]
    names = set(texts_in(resolved(settings)["space"]))
    rows += [row for row in METHODS.values() if row.name in names]
    rows += [row for name, row in FORMATS.items() if name in names]
    return dict(sorted(row.origin.rsplit(" ", 1) for row in rows if row.origin))
