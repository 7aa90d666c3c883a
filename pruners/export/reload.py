"""Script for a fresh process: loads an exported model with stock transformers and records its outputs.

It imports nothing of this project, so that its results are those of anybody who loads the directory.

    python -P reload.py MODEL CHECK

CHECK is a directory with ``request.json`` (``dtype`` to compute in, ``parameters`` to count zeros in, ``text`` to
tokenize, ``trust_remote_code``) and ``request.safetensors`` (``tokens``: ``rows length`` int64). It gets
``answer.json`` and ``answer.safetensors`` (``logits``: ``rows length vocabulary`` in float32).
"""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

N_PROMPT, N_GENERATED = 8, 8


def main(directory: Path, check: Path) -> None:
    """Answer the request in `check` about the model in `directory`."""
    request = json.loads((check / "request.json").read_text(encoding="utf-8"))
    tokens = load_file(check / "request.safetensors")["tokens"]
    trust: bool = request["trust_remote_code"]
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, request["dtype"]), output_loading_info=True, trust_remote_code=trust
    )
    model, loading = loaded
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust)
    with torch.inference_mode():
        logits = torch.cat([model(row[None], use_cache=False).logits.float() for row in tokens])
        generated, gap = _generate(model, tokens[:1, :N_PROMPT])
    weights = {name: model.get_parameter(name) for name in request["parameters"]}
    answer = {
        "architecture": type(model).__name__,
        "missing": sorted(loading["missing_keys"]),
        "unexpected": sorted(loading["unexpected_keys"]),
        "mismatched": sorted(str(key) for key in loading["mismatched_keys"]),
        "zeros": {name: int((weight == 0).sum()) for name, weight in weights.items()},
        "token_ids": tokenizer(request["text"])["input_ids"],
        "generated": generated,
        "generation_gap": gap,
    }
    save_file({"logits": logits.contiguous()}, check / "answer.safetensors")
    (check / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _generate(model: Any, prompt: torch.Tensor) -> tuple[list[int], float]:
    """Greedy tokens with the cache, and how far they are from greedy without it.

    Returns:
        The new tokens, and the largest distance of one's logit below the best logit at its place in one pass
        without a cache, relative to the largest logit: 0 if both ways choose the same tokens.
    """
    known = inspect.signature(model.forward).parameters
    names = ("cache", "cache_params", "past_key_values")  # of state-space models; of others before 5.24
    name = next(name for name in names if name in known)
    given = name in model(prompt, use_cache=True)  # RecurrentGemma gives none back, but fills one
    new, cache, step = [], None if given else DynamicCache(config=model.config), prompt
    places = torch.arange(prompt.shape[1] + N_GENERATED, device=prompt.device)[None]
    for n_known in range(prompt.shape[1], prompt.shape[1] + N_GENERATED):
        # As `generate` does: MiniMax counts the tokens of its first layer's cache, which may have none.
        own = (
            {"position_ids": places[:, n_known - step.shape[1] : n_known]} if "position_ids" in known else {}
        )
        out = model(step, **{name: cache}, **own, use_cache=True)
        cache, step = out.get(name, cache), out.logits[:, -1:].argmax(-1)
        new.append(step)
    generated = torch.cat(new, dim=1)
    tokens = torch.cat([prompt, generated], dim=1)[:, :-1]
    logits = model(tokens, use_cache=False).logits[:, prompt.shape[1] - 1 :].float()
    chosen = logits.gather(-1, generated[..., None])
    gap = (logits.amax(-1, keepdim=True) - chosen).amax() / logits.abs().amax()
    return generated[0].tolist(), float(gap)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
