"""What is trained, saved and shared: configuration, gated LoRA, sampler head, model card."""
