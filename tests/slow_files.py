"""Files built slowly by workers that die or raise; without torch, so that workers start at once."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from secateur.search.executors.cluster.settings import RaySettings

TWO = RaySettings(workers=2, cpus_per_worker=0.5)


@dataclass(frozen=True)
class Slow:
    """Writes numbers, slowly; `deadly` ones take the process along, `deaths` times."""

    directory: Path
    log: Path
    n: int = 6
    deadly: int | None = None
    deaths: int = 0
    pause: float = 0.0
    directories: tuple[Path, ...] = ()

    @property
    def files(self) -> list[Path]:
        return [self.directory / f"block-{i:04d}.safetensors" for i in range(self.n)]

    def __call__(self, directories, to, numbers, on_file) -> None:
        for number in numbers:
            path = to / self.files[number].name
            with self.log.open("a") as log:
                log.write(f"{number}\n")
            if number == self.deadly and self.written.count(number) <= self.deaths:
                os.kill(os.getpid(), signal.SIGKILL)
            if number == self.deadly and not self.deaths:
                raise ValueError("Expected some room, got none.")
            time.sleep(self.pause)
            path.write_text(str(number))
            on_file(path)

    @property
    def written(self) -> list[int]:
        return [int(line) for line in self.log.read_text().split()]


class Far(Slow):
    """Likewise on a node with a cache of its own."""

    def __setstate__(self, state: dict[str, object]) -> None:  # in the worker's process
        self.__dict__.update(state)
        os.environ["SECATEUR_CACHE"] = str(self.directory.parent / "cache")
