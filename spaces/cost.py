"""The dense model in a few numbers: what exact costs of candidates are counted from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Size of the dense model.

    Args:
        n_params: parameters of the whole model, embedding, norms and head included, shared ones once.
        bytes_per_param: as stored, e.g. 2 for bfloat16.
        macs_per_token: multiply-accumulates to compute one token.
        kv_bytes_per_token: bytes that one token adds to the KV cache.
    """

    n_params: int
    bytes_per_param: float
    macs_per_token: int
    kv_bytes_per_token: int
