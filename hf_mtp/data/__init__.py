"""Replaces the responses of a dataset with the model's own."""
