"""`evaluate`: tokens per pass and speed."""
