"""Settings for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# No deadlines: nothing here measures time. In continuous integration the examples are the same on every run, so that
# what it says of a change is about the change; elsewhere they are fresh ones.
settings.register_profile("reformer_lm", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("reformer_lm")
