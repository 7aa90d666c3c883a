"""Train the tokenizer and the model `tiny` on the text of corpus.py, on two CPU cores.

    python train.py CORPUS.jsonl WORK_DIR MODEL_DIR [--resume STEP] [--checkpoint STEP]

WORK_DIR keeps the tokenizer, the tokens and a checkpoint every 100 steps; MODEL_DIR gets the model in
float16. A phase with `spread_sigma` begins by spreading the channels' scales, see spread.py. --resume starts
from the checkpoint at a phase's end. With --checkpoint nothing is trained: the checkpoint of that step is
written as the model.
"""

import argparse
import json
import random
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from spread import spread_scales
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
PYTHON_DOCS = "python3.11-doc"


def train_tokenizer(corpus: Path, work: Path, vocab_size: int) -> Tokenizer:
    """Byte-level BPE on the corpus; digits one by one. Id 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    texts = (json.loads(line)["text"] for line in corpus.open(encoding="utf-8"))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(work / "tokenizer.json"))
    return tokenizer


def encode(corpus: Path, work: Path, tokenizer: Tokenizer, seed: int) -> None:
    """Save the tokens (uint16) of the Python documentation and of all other text, documents shuffled."""
    documents = [json.loads(line) for line in corpus.open(encoding="utf-8")]
    random.Random(seed).shuffle(documents)
    for name, is_python in (("python", True), ("other", False)):
        texts = [d["text"] for d in documents if (d["source"] == PYTHON_DOCS) == is_python]
        ids = [[*encoding.ids, 0] for encoding in tokenizer.encode_batch(texts)]
        np.save(work / f"{name}.npy", np.concatenate([np.array(i, dtype=np.uint16) for i in ids]))
        print(name, sum(map(len, ids)), "tokens", flush=True)


def batches(work: Path, phase: dict[str, Any], seed: int) -> Tensor:
    """All batches of a phase, (steps, windows, window + 1) token ids: a mixture first, Python's docs last."""
    window, steps, width = phase["window"], phase["steps"], phase["batch_windows"]
    rng = np.random.default_rng(seed)

    def epochs(tokens: np.ndarray, n_windows: int) -> np.ndarray:
        rows: list[np.ndarray] = []
        while len(rows) < n_windows:  # a new offset each epoch, so that windows differ
            starts = np.arange(rng.integers(window), len(tokens) - window - 1, window)
            rows.extend(tokens[s : s + window + 1] for s in rng.permutation(starts))
        return np.array(rows[:n_windows]).reshape(-1, window + 1)

    python, other = np.load(work / "python.npy"), np.load(work / "other.npy")
    n_last = int(steps * phase["python_docs_last"]) * width
    n_first = steps * width - n_last
    n_python = n_first * len(python) // (len(python) + len(other))
    first = rng.permutation(np.concatenate([epochs(python, n_python), epochs(other, n_first - n_python)]))
    rows = np.concatenate([first, epochs(python, n_last)]).astype(np.int64)
    return torch.from_numpy(rows).view(steps, width, window + 1)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration of Muon in float32.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, with the coefficients given there.
    `matrices` is (n, rows, columns); the result has singular values near 1.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum 0.95 and decoupled weight decay; matrices of one shape go together.

    torch.optim.Muon iterates in bfloat16, far slower than float32 on a CPU without bfloat16 units.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        super().__init__(
            [{"params": by_shape[shape]} for shape in sorted(by_shape)],
            {"lr": lr, "weight_decay": weight_decay},
        )
        self.momenta = [torch.zeros(len(g["params"]), *g["params"][0].shape) for g in self.param_groups]

    @torch.no_grad()
    def step(self) -> None:
        """One update of spectral norm about `lr`, times the root of rows / columns for tall matrices."""
        for group, momentum in zip(self.param_groups, self.momenta, strict=True):
            gradient = torch.stack([p.grad for p in group["params"]])
            momentum.lerp_(gradient, 0.05)
            update = orthogonalize(gradient.lerp(momentum, 0.95))
            scale = max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            for parameter, change in zip(group["params"], update, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(
                    change, alpha=-group["lr"] * scale
                )


MATRIX_OPTIMIZERS = {"muon": Muon, "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.95))}


def train(rank: int, settings: dict[str, Any], work: Path, resume: int) -> None:
    """One of the training processes; `resume` skips the phases up to that step and loads its checkpoint."""
    config = settings["training"]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{work}/rendezvous", rank=rank, world_size=config["processes"]
    )
    torch.manual_seed(settings["seed"])
    model = LlamaForCausalLM(llama_config(settings))
    if resume:
        model.load_state_dict(torch.load(work / f"step-{resume}.pt"))
    first = 0
    for number, phase in enumerate(config["phases"]):
        if first >= resume:
            seed = settings["seed"] + number
            data = batches(work, phase, seed)
            if "spread_sigma" in phase:
                spread_scales(model, phase["spread_sigma"], torch.Generator().manual_seed(seed))
            train_phase(model, data, first, config | phase, work)
        first += phase["steps"]


def train_phase(
    model: LlamaForCausalLM, data: Tensor, first: int, config: dict[str, Any], work: Path
) -> None:
    """Train on each batch of `data`, with fresh optimizers; `first` is the number of steps done before."""
    rank = dist.get_rank()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    gains = [p for p in model.parameters() if p.ndim == 1]
    embedding = model.get_input_embeddings().weight
    optimizers = [
        MATRIX_OPTIMIZERS[config["matrices"]](
            matrices, lr=config["matrix_lr"], weight_decay=config["weight_decay"]
        ),
        torch.optim.AdamW([embedding], lr=config["embedding_lr"], betas=(0.9, 0.95), weight_decay=0.0),
        torch.optim.AdamW(gains, lr=config["gain_lr"], betas=(0.9, 0.95), weight_decay=0.0),
    ]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    start, mean = time.monotonic(), 0.0
    for step, batch in enumerate(data, start=first + 1):
        ids = batch[rank :: config["processes"]]
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        average_gradients([*matrices, embedding, *gains], config)
        rate = float(np.interp(step, *zip(*config["rate"], strict=True)))
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        mean = 0.95 * mean + 0.05 * loss.item() if mean else loss.item()
        if rank == 0 and step % 20 == 0:
            row = {"step": step, "loss_nats": round(mean, 4), "seconds": round(time.monotonic() - start, 1)}
            print(json.dumps(row), flush=True)
        if rank == 0 and step % 100 == 0:
            torch.save(model.state_dict(), work / f"step-{step}.pt")


def average_gradients(parameters: list[nn.Parameter], config: dict[str, Any]) -> None:
    """Average the gradients over the processes and clip their norm."""
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= config["processes"]
    flat *= min(1.0, config["clip_norm"] / (flat.norm().item() + 1e-6))
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))


def llama_config(settings: dict[str, Any]) -> LlamaConfig:
    """The architecture; id 0 begins, ends and pads."""
    return LlamaConfig(
        vocab_size=settings["tokenizer"]["vocab_size"],
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **settings["model"],
    )


def export(settings: dict[str, Any], work: Path, step: int, to: Path) -> None:
    """Write the checkpoint of `step` as a float16 model directory with its tokenizer."""
    model = LlamaForCausalLM(llama_config(settings))
    model.load_state_dict(torch.load(work / f"step-{step}.pt"))
    model.half().save_pretrained(to)
    PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=settings["model"]["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(to)


def main() -> None:
    """Tokenizer and tokens (unless there already), training, export."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("corpus", "work", "model"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--resume", type=int, default=0)
    parser.add_argument("--checkpoint", type=int)
    arguments = parser.parse_args()
    settings = yaml.safe_load(Path(__file__).with_name("config.yaml").read_text())
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "other.npy").exists():
        tokenizer = train_tokenizer(arguments.corpus, work, settings["tokenizer"]["vocab_size"])
        encode(arguments.corpus, work, tokenizer, settings["seed"])
    config = settings["training"]
    if arguments.checkpoint is None:
        (work / "rendezvous").unlink(missing_ok=True)
        torch.multiprocessing.spawn(train, (settings, work, arguments.resume), nprocs=config["processes"])
    last = sum(phase["steps"] for phase in config["phases"])
    export(settings, work, arguments.checkpoint or last, arguments.model)


if __name__ == "__main__":
    main()
