"""What is learned: the losses, over blocks of masks that hang on a text."""
