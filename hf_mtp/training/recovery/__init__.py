"""What keeps a long training alive: whole checkpoints, and checks of losses, processes and workers."""
