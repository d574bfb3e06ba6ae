"""Runs, sweeps of runs, what they say, and how it is shown."""
