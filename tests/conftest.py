"""What every test relies on: no network, a fixed number of threads, and examples that repeat."""

import os

from hypothesis import settings

from tests.ray_session import ray_cluster  # noqa: F401  # a fixture for all

# Before torch and transformers are imported, which read them once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

# deadline: the first example of a test pays for imports. derandomize: a failure in CI is one that everybody can repeat.
settings.register_profile("secateur", deadline=None, derandomize=True, database=None)
settings.load_profile("secateur")
