"""Whether a file of weights is the whole adapter that its config says, and no other."""

import torch


def refuse_weights_unlike(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raises for weights that an adapter cannot have.

    Args:
        weights (`dict[str, torch.Tensor]`): What a file holds, under the names of the model's.
        expected (`dict[str, torch.Tensor]`): The adapter's in the model, whose shapes count.

    Raises:
        ValueError: A tensor is missing, unknown, of another shape or not finite.
    """
    both = [key for key in expected if key in weights]
    problems = {
        "lack": sorted(expected.keys() - weights.keys()),
        "have the unknown": sorted(weights.keys() - expected.keys()),
        "have the wrong shape for": [key for key in both if weights[key].shape != expected[key].shape],
        "have values that are not finite in": [key for key in both if not torch.isfinite(weights[key]).all()],
    }
    for problem, keys in problems.items():
        if keys:
            raise ValueError(
                f"The adapter's weights {problem} {len(keys)} tensor(s), such as {keys[0]!r}: the file is truncated, "
                "was changed, or belongs to another base or config. Download it again, or train again."
            )
