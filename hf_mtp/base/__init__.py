"""Facts about a base model, read from the model itself rather than from the name of its architecture."""
