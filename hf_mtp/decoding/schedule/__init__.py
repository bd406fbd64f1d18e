"""Schedules: how many masks a pass computes, and which drafts it verifies."""
