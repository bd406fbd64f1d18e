"""`generate(mtp=True)`: the decode loop, drafters, verification and schedules."""
