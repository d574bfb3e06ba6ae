"""Timings of this machine: matrix products, our step, the peers', and how each grows."""
