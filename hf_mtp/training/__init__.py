"""[`MTPTrainer`], its configuration, checkpoints, and what is seen of a training."""
