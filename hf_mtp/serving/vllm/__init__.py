"""An adapter inside vLLM, out of tree: each step of the engine verifies the last drafts and computes the next masks.

vLLM brings its own transformers. So this package imports torch, safetensors and vLLM only, and `hf_mtp` can be
installed beside vLLM without its other dependencies (`pip install --no-deps hf_mtp`).
"""
