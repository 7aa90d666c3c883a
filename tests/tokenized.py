"""Long texts tokenized once a process: every search begins with the same three, which is most of a small one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

LONG = 10_000  # characters


@pytest.fixture(scope="session", autouse=True)
def long_texts_tokenized_once() -> Iterator[None]:
    """A tokenizer's answer for a long text is that of the first one with equal content to the same question."""
    if "transformers" not in sys.modules:  # no test that was collected tokenizes much
        yield
        return
    from transformers import BatchEncoding, PreTrainedTokenizerBase

    tokenize = PreTrainedTokenizerBase.__call__
    known: dict[object, dict[str, Any]] = {}

    def once(self: Any, text: Any = None, *arguments: Any, **options: Any) -> BatchEncoding:
        backend = getattr(self, "backend_tokenizer", None)
        if backend is None or not isinstance(text, str) or len(text) < LONG or arguments:
            return tokenize(self, text, *arguments, **options)
        key = (backend.to_str(), text, repr(sorted(options.items())))
        if key not in known:
            known[key] = dict(tokenize(self, text, **options))
        return BatchEncoding({name: list(ids) for name, ids in known[key].items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "__call__", once)
        yield
