"""Where masks stand, and what they see: functions of positions, which know no model."""
