"""Times a trial of writing the mirror, by Optuna's own `add_trials` and as Secateur does.

    python mirror.py [--parameters 12 210] [--trials 400]

Milliseconds of CPU and of the clock a trial; in a search this runs in a thread of its own, beside the driver's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import optuna
from optuna.storages.journal import JournalFileBackend, JournalStorage

from secateur.search.controllers.optuna.samplers import quiet_optuna
from secateur.search.mirror.optuna_copy import BATCH
from secateur.search.mirror.storages import storage_of

LEVELS = tuple(round(0.05 * i, 2) for i in range(20))


def trials(n_parameters: int, n_trials: int) -> list[optuna.trial.FrozenTrial]:
    now = datetime.now()
    distributions = {
        f"model.layers.{i // 7}.linear{i % 7}": optuna.distributions.CategoricalDistribution(LEVELS)
        for i in range(n_parameters)
    }
    return [
        optuna.trial.FrozenTrial(
            number=-1,
            trial_id=-1,
            state=optuna.trial.TrialState.COMPLETE,
            value=None,
            values=[1.0, 2.0],
            datetime_start=now,
            datetime_complete=now,
            params={name: LEVELS[(i + j) % len(LEVELS)] for j, name in enumerate(distributions)},
            distributions=distributions,
            user_attrs={"number": i, "candidate": "candidate", "fidelity": "search:512"},
            system_attrs={},
            intermediate_values={},
        )
        for i in range(n_trials)
    ]


def timed(what: str, n: int, write: Callable[[], None]) -> None:
    cpu, wall = time.process_time(), time.perf_counter()
    write()
    cpu, wall = (1000 * x / n for x in (time.process_time() - cpu, time.perf_counter() - wall))
    print(f"{what}: {cpu:.2f} ms CPU, {wall:.2f} ms")


def ours(directory: Path, address: str | None, made: list[optuna.trial.FrozenTrial]) -> None:
    storage = storage_of(directory, address)
    storage.create(["minimize", "minimize"])
    batches = range(0, len(made), BATCH)
    what = "database" if address else "journal"
    timed(f"  {what}", len(made), lambda: [storage.add(made[i : i + BATCH], i) for i in batches] and None)
    storage.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, nargs="+", default=[12, 210])
    parser.add_argument("--trials", type=int, default=400)
    arguments = parser.parse_args()
    quiet_optuna()
    for n_parameters in arguments.parameters:
        made = trials(n_parameters, arguments.trials)
        print(f"{n_parameters} parameters")
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            ours(directory, None, made)
            ours(directory, f"sqlite:///{directory}/ours.db", made)
            journal = JournalStorage(JournalFileBackend(str(directory / "theirs.log")))
            database = f"sqlite:///{directory}/theirs.db"
            for what, storage, some in (("journal", journal, made), ("database", database, made[:50])):
                study = optuna.create_study(storage=storage, directions=["minimize", "minimize"])
                timed(f"  {what}, add_trials", len(some), lambda s=study, some=some: s.add_trials(some))


if __name__ == "__main__":
    main()
