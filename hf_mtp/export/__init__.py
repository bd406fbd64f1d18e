"""Converts adapters for other engines: the vLLM format, and Uno's format, which SGLang reads."""
