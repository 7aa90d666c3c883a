"""Latency tables as files: in the user's cache by their conditions, or at a path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from secateur.evaluators.latency.conditions import LatencySetup, conditions, key_of, options_of
from secateur.evaluators.latency.rounds import Spread
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.checkpoints.cache import cache_root
from secateur.spaces.latency import LatencyTable, at_batch
from secateur.spaces.limited_text import cut, read_text
from secateur.spaces.whole_file import whole_file


@dataclass(frozen=True)
class MeasuredTable:
    """A latency table with the record of its measurement.

    Args:
        table: of times.
        conditions: see `conditions`; of several batch sizes ``batch`` is their list.
        dense: milliseconds of the whole dense model, measured in the same rounds, to compare the sum over the table
            with.
        rounds: their number.
    """

    table: LatencyTable
    conditions: Mapping[str, Any]
    dense: Mapping[str, Spread]
    rounds: int

    @property
    def batches(self) -> list[int]:
        """Batch sizes, that of the plain phases first."""
        batch = self.conditions["batch"]
        return list(batch) if isinstance(batch, list) else [batch]

    @classmethod
    def joined(cls, tables: Sequence[MeasuredTable]) -> MeasuredTable:
        """One table of several that differ in the batch size alone; the first one's phases have plain names."""
        first, *others = tables
        if not others:
            return first
        phases, dense = dict(first.table.phases), dict(first.dense)
        for other in others:
            [batch] = other.batches
            phases |= {at_batch(name, batch): times for name, times in other.table.phases.items()}
            dense |= {at_batch(name, batch): spread for name, spread in other.dense.items()}
        found = {**first.conditions, "batch": [batch for table in tables for batch in table.batches]}
        return cls(LatencyTable(key_of(found), phases), found, dense, first.rounds)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {
            "conditions": dict(self.conditions),
            "rounds": self.rounds,
            "dense_ms": {phase: asdict(spread) for phase, spread in self.dense.items()},
            "table": self.table.to_json(),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> MeasuredTable:
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: if the values are no table.
        """
        return cls(
            table=LatencyTable.from_json(raw["table"]),
            conditions=dict(raw["conditions"]),
            dense={phase: Spread(**spread) for phase, spread in raw["dense_ms"].items()},
            rounds=int(raw["rounds"]),
        )


@dataclass(frozen=True)
class TableSource:
    """Source of a search's table.

    Args:
        setup: the conditions of a table in the user's cache.
        path: of a file with a table, such as one that was measured on another machine; in place of the cache.
        known: a table, such as the one that a run began with; in place of both.
        further: batch sizes besides that of `setup`.
    """

    setup: LatencySetup
    path: str | None = None
    known: LatencyTable | None = None
    further: tuple[int, ...] = ()

    @property
    def setups(self) -> list[LatencySetup]:
        """Conditions for each batch size."""
        return [self.setup, *(replace(self.setup, batch=batch) for batch in self.further)]


def save_table(measured: MeasuredTable) -> Path:
    """Write a table to the user's cache.

    Returns:
        Its path.

    Raises:
        OSError: if the cache can't be written.
    """
    path = _place(measured.table.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as new:
        new.write_text(json.dumps(measured.to_json(), indent=1) + "\n", encoding="utf-8")
    return path


def load_table(
    anatomy: Anatomy, setup: LatencySetup, device: torch.device | None = None
) -> MeasuredTable | None:
    """The table of a model on its device in the user's cache; None if it was not measured.

    Raises:
        ValueError: if the file is damaged, or the model's blocks differ in shape.
    """
    path = _place(key_of(conditions(anatomy, setup, device)))
    return _read(path) if path.is_file() else None


def find_table(
    anatomy: Anatomy, source: TableSource, model: str, device: torch.device | None = None
) -> LatencyTable:
    """The table of a search.

    Args:
        anatomy: the dense model.
        source: of the table.
        model: its name, for errors.
        device: of a model that is without memory; None: the model's.

    Raises:
        ValueError: if there is none, or it is of another model; the message says how to make one.
    """
    if source.known is not None:
        return source.known
    command = f"secateur latency {model}{options_of(source.setups)}"
    if source.path is None:
        tables = []
        for setup in source.setups:
            table = load_table(anatomy, setup, device)
            if table is None:
                found = conditions(anatomy, setup, device)
                on = f"{found['device']}, {found['dtype']}, batch {found['batch']}, prompt {found['prompt']}"
                threads = "" if found["threads"] is None else f", threads {found['threads']}"
                raise ValueError(
                    f"Expected a latency table of {model} on this device ({on}{threads}), got none. "
                    f"Measure it on an otherwise idle machine with: {command}"
                )
            tables.append(table)
        return MeasuredTable.joined(tables).table
    found, measured = conditions(anatomy, source.setup, device), _read(Path(source.path))
    asked = [setup.batch for setup in source.setups]
    if source.further and measured.batches != asked:
        raise ValueError(
            f"Expected a latency table at the batch sizes {asked}, got one at {measured.batches} in {source.path}. "
            f"Make one on the target device with: {command} --json"
        )
    if measured.conditions.get("shape") != found["shape"]:
        raise ValueError(
            f"Expected a latency table of {model}, got one of a model of another shape in {source.path}. "
            f"Make one on the target device with: {command} --json"
        )
    return measured.table


def table_sha256(table: LatencyTable) -> str:
    """Hash of its numbers: predictions from another table can't be compared."""
    return hashlib.sha256(json.dumps(table.to_json(), sort_keys=True).encode()).hexdigest()


def _place(key: str) -> Path:
    return cache_root() / "latency" / f"{key}.json"


def _read(path: Path) -> MeasuredTable:
    try:
        return MeasuredTable.from_json(json.loads(read_text(path, "a latency table")))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"Expected a latency table in {path}, got {cut(repr(error), 300)}. Measure it again."
        ) from error
