"""The training objective: four losses on blocks of masks. Knows nothing of trainers or decoding."""
