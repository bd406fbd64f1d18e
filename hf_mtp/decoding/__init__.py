"""`generate(mtp=True)`: reading several tokens per pass, drafting, verification, pacing."""
