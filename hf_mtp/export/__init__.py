"""Adapters in the files of other engines: a folder for vLLM, and Uno's layout, which SGLang reads."""
