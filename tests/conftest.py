"""What all tests share: no network, no user's data or cache, no deadlines."""

from __future__ import annotations

import os

import hypothesis

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("SPARSEJEPA_DATA", None)

# A busy machine must not fail a test, and a failure must be the same on every machine.
hypothesis.settings.register_profile("sparsejepa", deadline=None, derandomize=True)
hypothesis.settings.load_profile("sparsejepa")
