"""One forward pass of a causal LM, to be timed: a prompt, or one more token."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from secateur.evaluators.latency.clock import Call, captured
from secateur.evaluators.latency.conditions import LatencySetup
from secateur.spaces.latency import PhaseName


class Forward:
    """Forward passes of a model in one phase.

    Args:
        model: a causal LM of transformers, with which the prompt's keys and values are computed.
        phase: ``prefill``: the whole prompt, logits of its last token, as generation asks for them; ``decode``: one
            token more.
        setup: batch and prompt.
        head: False: without the projection to logits.
        cached: False: no keys and values are kept or read, for blocks without attention.
        changed: changes the model while its calls are prepared and made.
    """

    def __init__(
        self,
        model: nn.Module,
        phase: PhaseName,
        setup: LatencySetup,
        *,
        head: bool = True,
        cached: bool = True,
        changed: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        whole: Any = model
        self._run = whole if head else whole.base_model
        self._last_only = {"logits_to_keep": 1} if head else {}
        takes = inspect.signature(self._run.forward).parameters
        self._cache_name = (
            "cache" if "cache" in takes else "past_key_values"
        )  # its name before transformers 5.24
        self._config = whole.config
        self._cached = cached
        self._changed = changed
        tokens = _tokens(whole, setup)
        self._in_graph = phase == "decode" and tokens.device.type == "cuda" and not setup.eager
        self._graph: Call | None = None
        self._prompt: Any = None  # the cache that calls start from
        self._tokens = tokens
        if phase == "decode":
            self._tokens = tokens[:, :1]
            if cached:
                with torch.inference_mode(), changed():
                    prompt = self._fresh()
                    self._call(tokens, prompt)
                self._prompt = prompt

    @contextmanager
    def ready(self) -> Iterator[Call]:
        """A `Subject`; decode steps on a CUDA device are replays of a graph, see `LatencySetup.eager`."""
        with torch.inference_mode(), self._changed():
            if self._in_graph:
                if self._graph is None:
                    step = lambda: self._call(self._tokens, self._fresh())  # noqa: E731
                    self._graph = captured(step, self._tokens.device)
                yield self._graph
                return
            cache = self._fresh()
            yield lambda: self._call(self._tokens, cache)

    def _call(self, tokens: torch.Tensor, cache: Any) -> object:
        more = {self._cache_name: cache, **self._last_only}
        return self._run(input_ids=tokens, use_cache=self._cached, **more)

    def _fresh(self) -> Any:
        """A cache as it is before the call. When it grows, a layer's tensors are replaced, not changed."""
        from transformers import DynamicCache

        if not self._cached:
            return None
        if self._prompt is None:
            return DynamicCache(config=self._config)
        fresh = copy.copy(self._prompt)
        fresh.layers = [copy.copy(layer) for layer in self._prompt.layers]
        return fresh


def _tokens(model: Any, setup: LatencySetup) -> torch.Tensor:
    """Random tokens; their values don't matter, within the vocabulary.

    Raises:
        ValueError: if the model has no room for the prompt and one token more.
    """
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and setup.prompt >= room:
        raise ValueError(
            f"Expected `prompt` < {room}, the model's longest context, got {setup.prompt}. Use less."
        )
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    shape = (setup.batch, setup.prompt)
    return torch.randint(embedding.num_embeddings, shape, generator=generator).to(embedding.weight.device)
