"""Suites of prompts: what is in them, and how they are read."""
