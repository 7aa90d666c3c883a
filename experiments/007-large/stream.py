"""Measures the memory of a streamed prune of random weights in true shapes, and what a kill -9 costs it.

    python stream.py DIR [--shapes llama-3.2-1b] [--recipes wanda sparsegpt] [--kill-in 7] [--cap 1.6] [--out FILE]

The model is written into DIR shard by shard, a block in memory at a time, and is deleted at the end with what was made
from it. Memory is the largest `RssAnon` of /proc/PID/status, looked at 50 times a second, of the pruning process and of
the process that loads the result: pages of mapped files do not count, which the system may drop at any time. `--cap`
sets RLIMIT_DATA, which both inherit: the kernel refuses memory beyond so many GB and the size of the weights, whose
private maps count. One line of the table is one prune, with the blocks that it had done where SIGTERM stops it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig

from secateur.pruners.models.loading import load_model

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
VOCABULARY = 128256
stopped: list[int] = []
"""Signals that ask to end."""


def write_model(directory: Path, shapes: dict[str, Any]) -> int:
    """Random weights in bf16 with the tokenizer of tiny; bytes of the weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, tie_word_embeddings=True, rms_norm_eps=1e-5, dtype="bfloat16", **shapes
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    load_model("tiny").tokenizer.save_pretrained(directory)
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    rows, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    sizes = {
        "self_attn.q_proj": (rows, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, rows),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    n_files, names, total = config.num_hidden_layers + 1, {}, 0
    for index in range(n_files):
        ones = {"norm": torch.ones(width, dtype=torch.bfloat16)}
        if index == 0:
            made = {"model.embed_tokens.weight": drawn(VOCABULARY, width), "model.norm.weight": ones["norm"]}
        else:
            block = f"model.layers.{index - 1}"
            made = {f"{block}.{name}.weight": drawn(*size) for name, size in sizes.items()}
            norms = ("input_layernorm", "post_attention_layernorm")
            made |= {f"{block}.{name}.weight": ones["norm"].clone() for name in norms}
        file = f"model-{index + 1:05d}-of-{n_files:05d}.safetensors"
        save_file(made, directory / file, metadata={"format": "pt"})
        names |= dict.fromkeys(made, file)
        total += sum(x.nbytes for x in made.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file), encoding="utf-8")
    return total


def status_bytes(pid: int, name: str) -> int:
    """A size in /proc/PID/status; 0 once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def children(pid: int) -> list[int]:
    """Child processes of the process's main thread."""
    try:
        return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]
    except OSError:
        return []


def blocks_done(progress: Path) -> int:
    """Finished blocks of an unfinished export."""
    try:
        found: int = json.loads(progress.read_text(encoding="utf-8"))["n_blocks"]
    except (OSError, ValueError):
        return 0
    return found


def prune(
    model: Path, recipe: Path, to: Path, options: argparse.Namespace, kill_in: int = 0
) -> dict[str, Any]:
    """One prune, watched; killed while it is at a block, if one is given.

    Returns:
        Largest memory of the process and of the one that loads the result, seconds, and for each number of finished
        blocks that was seen the seconds since the start.
    """
    command = [sys.executable, "-m", "secateur.search.cli", "prune", str(model), "--to", str(to)]
    command += ["--recipe", str(recipe), "--dtype", "bfloat16", "--stream", "always", "--json"]
    command += ["--tokens", str(options.tokens), "--window", str(options.window)]
    progress = to.parent / f".{to.name}-streamed" / "progress.json"
    began, most, loading, data, seen = time.monotonic(), 0, 0, 0, dict[int, float]()
    limit = sum(x.stat().st_size for x in model.glob("*.safetensors")) + round(options.cap * 1e9)

    def capped() -> None:
        if options.cap:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, preexec_fn=capped) as process:  # noqa: PLW1509  # no threads here
        while process.poll() is None and not stopped:
            most = max(most, status_bytes(process.pid, "RssAnon"))
            data = max(data, status_bytes(process.pid, "VmData"))
            loading = max([loading, *(status_bytes(x, "RssAnon") for x in children(process.pid))])
            if progress.exists():
                seen.setdefault(blocks_done(progress), round(time.monotonic() - began, 1))
            if kill_in and max(seen, default=0) == kill_in - 1:
                time.sleep(0.5 * (seen[kill_in - 1] - seen[kill_in - 2]))  # in the midst of the block
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
        if stopped:
            process.kill()
        output, errors = process.communicate()
    if process.returncode and not kill_in and not stopped:
        raise SystemExit(errors)
    return {
        "gb": round(most / 1e9, 2),
        "loading_gb": round(loading / 1e9, 2),
        "data_gb": round(data / 1e9, 2),
        "cap_gb": options.cap or None,
        "seconds": round(time.monotonic() - began),
        "blocks_done": seen,
        "stopped": bool(stopped),
        "measured": json.loads(output)["measured"] if output else None,
    }


def line_of(shapes: str, recipe: str, n_bytes: int, found: dict[str, Any]) -> str:
    """Row of the table."""
    return (
        f"| {shapes} | {recipe} | {n_bytes / 1e9:.2f} | {found['gb']:.2f} | {found['loading_gb']:.2f} | "
        f"{found['seconds']} |"
    )


def parsed() -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--blocks", type=int, default=0, help="of these shapes; 0: as many as the model has")
    parser.add_argument("--recipes", nargs="*", default=["wanda", "sparsegpt"])
    parser.add_argument(
        "--kill-in", type=int, default=0, help="block, from 1; of the first recipe, once more"
    )
    parser.add_argument("--samples", type=int, default=2, help="calibration windows")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512, help="to measure on")
    parser.add_argument(
        "--cap", type=float, default=0.0, help="GB beyond the weights, by RLIMIT_DATA; 0: none"
    )
    parser.add_argument("--out", type=Path, help="file that lines are added to")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    work = options.directory / f"stream-{options.shapes}"
    model = work / "model"
    model.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    try:
        fewer = {"num_hidden_layers": options.blocks} if options.blocks else {}
        n_bytes = write_model(model, SHAPES[options.shapes] | fewer)
        print("| shapes | recipe | weights, GB | pruning, GB | loading it again, GB | seconds |", flush=True)
        print("|---|---|---|---|---|---|", flush=True)
        for recipe in options.recipes:
            file = work / f"{recipe}.yaml"
            calibration = {"samples": options.samples, "length": options.window, "choose": "random"}
            plain = {"unit": "weights", "sparsity": 0.5, "metric": recipe, "calibration": calibration}
            file.write_text(
                yaml.safe_dump({"recipe": plain, "sources": {"calibration": "docs"}}), encoding="utf-8"
            )
            runs = [(recipe, 0)]
            if options.kill_in and recipe == options.recipes[0]:
                runs += [
                    (f"{recipe}, killed in block {options.kill_in}", options.kill_in),
                    ("the same command", 0),
                ]
            for name, kill_in in [] if stopped else runs:
                to = work / ("killed" if len(runs) > 1 and name != recipe else recipe)
                found = prune(model, file, to, options, kill_in)
                print(line_of(options.shapes, name, n_bytes, found), flush=True)
                if options.out:
                    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
                    of = {"shapes": options.shapes, "blocks": options.blocks or None, "recipe": name}
                    row = {**of, "weights": n_bytes, **found, **machine}
                    with options.out.open("a", encoding="utf-8") as out:
                        out.write(json.dumps(row) + "\n")
            shutil.rmtree(work / recipe, ignore_errors=True)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
