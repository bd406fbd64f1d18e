"""Positions and attention of masks: functions of integer tensors that do not depend on a model."""
