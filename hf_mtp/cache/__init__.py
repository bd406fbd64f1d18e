"""Caches of decoding, whose rows keep accepted tokens and roll back the others."""
