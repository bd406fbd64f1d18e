"""What speculative decoding did: counts, and nothing else."""

from dataclasses import dataclass, field


@dataclass
class MTPStatistics:
    """Counts of one `generate(mtp=True)`.

    Args:
        forward_passes (`int`): Forward passes of the base model, the one over the prompt included.
        tokens (`int`): New tokens returned.
        drafted (`int`): Drafts that were verified.
        accepted (`int`): Drafts that were returned to the user.
        drafted_per_position, accepted_per_position (`list[int]`): The same for the first, second ... draft of a step.
        steps (`list[int]`): New tokens of each forward pass, in order.
    """

    forward_passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_per_position: list[int] = field(default_factory=list)
    accepted_per_position: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """New tokens per forward pass. Plain decoding has 1."""
        return self.tokens / self.forward_passes if self.forward_passes else 0.0

    def count_step(self, drafted: int, accepted: int, tokens: int) -> None:
        """Counts one forward pass.

        Args:
            drafted (`int`): Drafts that the pass verified.
            accepted (`int`): How many of these were right and returned.
            tokens (`int`): New tokens that the pass gave in all.
        """
        self.forward_passes += 1
        self.tokens += tokens
        self.drafted += drafted
        self.accepted += accepted
        self.steps.append(tokens)
        missing = drafted - len(self.drafted_per_position)
        self.drafted_per_position += [0] * missing
        self.accepted_per_position += [0] * missing
        for position in range(drafted):
            self.drafted_per_position[position] += 1
            self.accepted_per_position[position] += position < accepted
