"""One Ray for all tests: starting one takes seconds and half a GB."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Address of a small Ray on this machine, to which this process is connected."""
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as short:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own
            context = ray.init(
                address="local",
                num_cpus=2,
                num_gpus=0,
                include_dashboard=False,
                object_store_memory=100 << 20,
                log_to_driver=False,
                _temp_dir=short,
            )
        try:
            yield context.address_info["gcs_address"]
        finally:
            ray.shutdown()
