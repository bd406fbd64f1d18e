"""Positions of masks and what they attend to: functions of integer tensors that know no model."""
