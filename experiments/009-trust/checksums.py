"""Cost of the checksums of levels: opening a store, and reading all of it once, with and without them.

    python checksums.py SCRATCH [--blocks 8] [--mb 32] [--rounds 5] [--results checksums.jsonl]

Two stores with the same random tensors, of which the second has no checksums, as those of earlier versions. Each round
opens both in a process of its own, asks for every block and adds up its tensors. CPU seconds, least of the rounds: a
loaded machine only adds to them. Files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

N_TENSORS = 7


def make(scratch: Path, n_blocks: int, mb: float) -> None:
    """Both stores."""
    import torch
    from safetensors.torch import save_file

    from secateur.pruners.stores.block_files import StoredBlocks, save_block

    generator = torch.Generator().manual_seed(0)
    for name in ("checked", "unchecked"):
        (scratch / name).mkdir(parents=True, exist_ok=True)
    for block in range(n_blocks):
        size = int(mb * 1e6 / 4 / N_TENSORS)
        tensors = {f"level-{i}": torch.randn(size, generator=generator) for i in range(N_TENSORS)}
        save_block(tensors, scratch / "checked", block)
    for file in sorted((scratch / "checked").glob("block-*")):
        save_file(
            StoredBlocks(scratch / "checked", n_blocks)[_number(file)], scratch / "unchecked" / file.name
        )


def _number(file: Path) -> int:
    return int(file.stem.rpartition("-")[2])


def use(directory: Path, n_blocks: int) -> None:
    """Open a store and read all of it, and print what that took."""
    from secateur.pruners.stores.block_files import StoredBlocks

    began = time.process_time()
    blocks = list(StoredBlocks(directory, n_blocks))
    opened = time.process_time()
    total = sum(float(tensor.sum()) for block in blocks for tensor in block.values())
    read = time.process_time()
    print(json.dumps({"open_s": opened - began, "read_s": read - opened, "sum": total}))


def measured(directory: Path, n_blocks: int) -> dict[str, float]:
    """One round of one store."""
    command = [sys.executable, __file__, str(directory), "--blocks", str(n_blocks), "--use"]
    found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--mb", type=float, default=32, help="of a block")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--use", action="store_true", help="open and read the store SCRATCH")
    args = parser.parse_args()
    if args.use:
        use(args.scratch, args.blocks)
        return
    make(args.scratch, args.blocks, args.mb)
    names = ("checked", "unchecked")
    rounds = [
        {name: measured(args.scratch / name, args.blocks) for name in names} for _ in range(args.rounds)
    ]
    row: dict[str, Any] = {"experiment": "checksums", "mb": args.blocks * args.mb}
    for name in names:
        row[name] = {key: round(min(one[name][key] for one in rounds), 4) for key in ("open_s", "read_s")}
    row["opening"] = round(row["checked"]["open_s"] / row["unchecked"]["open_s"], 1)
    both = [sum(row[name].values()) for name in names]
    row["opening_and_reading_once"] = round(both[0] / both[1], 2)
    row["check_mb_per_s"] = round(row["mb"] / (row["checked"]["open_s"] - row["unchecked"]["open_s"]))
    print(json.dumps(row, indent=1))
    if args.results:
        args.results.write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
