"""What all tests share: no network, no user's data or cache, no deadlines."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("SPARSEJEPA_DATA", None)
# Kept between calls: entries are keyed on their content, and the built-in scenes take a while.
os.environ["SPARSEJEPA_CACHE"] = str(Path(__file__).parent.parent / ".pytest_cache" / "data")

# A busy machine must not fail a test, and a failure must be the same on every machine.
hypothesis.settings.register_profile("sparsejepa", deadline=None, derandomize=True)
hypothesis.settings.load_profile("sparsejepa")
