"""Callbacks of a training: its end, its progress, its curves, and decoding on the way."""
