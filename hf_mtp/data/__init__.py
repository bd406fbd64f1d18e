"""Responses of the model itself, in place of a dataset's."""
