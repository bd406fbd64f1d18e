"""[`MTPTrainer`] with its configuration, checkpoints and callbacks."""
