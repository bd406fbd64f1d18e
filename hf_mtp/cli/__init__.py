"""The command `hf-mtp`, with one file for each verb."""
