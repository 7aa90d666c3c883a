"""Peak memory of the conversion of a GGUF file, beside the size of the model in float32.

    python experiments/006-models/conversion.py            # a synthetic Llama of 96 M parameters in Q8_0
    python experiments/006-models/conversion.py FILE.gguf

Prints a row of the table in README.md. The conversion runs in a process of its own; what it holds before, with all
packages imported, is taken off.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

VOCABULARY, WIDTH, CHANNELS, BLOCKS, HEADS = 32_000, 768, 2048, 10, 12
MIB = 2**20


def write_synthetic(path: Path) -> None:
    """A GGUF file of random weights in Q8_0, with a vocabulary of bytes and made-up words."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    words = ["<|end|>", "w", "1", *(f"w{index}" for index in range(VOCABULARY - 3))]
    numbers = {
        writer.add_vocab_size: VOCABULARY,
        writer.add_context_length: 2048,
        writer.add_embedding_length: WIDTH,
        writer.add_block_count: BLOCKS,
        writer.add_feed_forward_length: CHANNELS,
        writer.add_head_count: HEADS,
        writer.add_head_count_kv: HEADS,
        writer.add_rope_dimension_count: WIDTH // HEADS,
    }
    for add, number in numbers.items():
        add(number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3] + [1] * (VOCABULARY - 1))
    writer.add_token_merges(["w 1"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(0)
    rng, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
    for block in range(BLOCKS):
        square = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH))
        mlp = {"ffn_gate": (CHANNELS, WIDTH), "ffn_up": (CHANNELS, WIDTH), "ffn_down": (WIDTH, CHANNELS)}
        norms = dict.fromkeys(("attn_norm", "ffn_norm"), (WIDTH,))
        shapes |= {f"blk.{block}.{name}": shape for name, shape in {**square, **mlp, **norms}.items()}
    for name, shape in shapes.items():
        values = rng.normal(0, 0.02, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converted(path: Path) -> None:
    """Convert in this process, and print what it took as JSON."""
    import gguf  # noqa: F401  # counted before
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils  # noqa: F401

    from secateur.pruners.models.checkpoints.gguf_file import convert

    ctypes.CDLL("libc.so.6").malloc_trim(0)
    told: list[str] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as directory:
        convert(path, Path(directory), told.append)
        size = (Path(directory) / "model.safetensors").stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"model": size / MIB, "peak": (peak - before) / 1024}
    print(json.dumps(found | {"lines": len(told)}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        converted(asked.file)
        return
    with tempfile.TemporaryDirectory() as directory:
        path = asked.file or Path(directory) / "synthetic-q8_0.gguf"
        if asked.file is None:
            write_synthetic(path)
        command = [sys.executable, __file__, str(path), "--inside"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"| {path.name} | {path.stat().st_size / MIB:.0f} MiB | {found['model']:.0f} MiB | {found['peak']:.0f} MiB "
            f"| {found['peak'] / found['model']:.2f} | {found['lines']} |"
        )


if __name__ == "__main__":
    main()
