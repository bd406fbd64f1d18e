"""An OpenAI-compatible server for adapters."""
