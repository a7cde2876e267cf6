"""Settings for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# Tests run on all cores, one process each; more threads than cores would wait for each other. Set before torch is
# imported; processes that tests start inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadlines: nothing here measures time. In continuous integration the examples are the same on every run, so that
# what it says of a change is about the change; elsewhere they are fresh ones.
settings.register_profile("reformer_lm", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("reformer_lm")
