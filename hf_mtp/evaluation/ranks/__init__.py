"""`probe`: what a model knows of later tokens, as their ranks."""
