"""What the other rooms stand on: facts about a base model, read from the model itself; files; the machine; plots."""
