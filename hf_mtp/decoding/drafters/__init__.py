"""Sources of drafts: masks, and text that repeats."""
