"""Forward passes of decoding and training, and trials of what a model's passes allow."""
