"""Frozen encoders: what they are (encoder), where they come from (load), where they go (export)."""
