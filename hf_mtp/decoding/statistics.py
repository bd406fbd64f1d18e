"""Counts of speculative decoding. Knows nothing of time."""

from dataclasses import dataclass, field

from transformers.generation import GenerateDecoderOnlyOutput

from .outcome import MASK_DRAFTER, Outcome


@dataclass
class MTPStatistics:
    """Counts of one `generate(mtp=True)`.

    Args:
        forward_passes (`int`): Forward passes of the base model, the one over the prompt included.
        tokens (`int`): New tokens returned.
        drafted (`int`): Drafts that were verified, alternatives included.
        accepted (`int`): Drafts that were accepted and returned.
        looked_up (`int`): Accepted drafts that were looked up, in the text or in the adapter's n-gram table; the
            others came from masks.
        drafted_per_position, accepted_per_position (`list[int]`): The same for the first, second ... token after a
            step's pending token.
        steps (`list[int]`): New tokens of each forward pass, in order, all rows together.
        row_steps (`int`): Forward passes, counted once for each row of the batch that had not ended.
    """

    forward_passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    looked_up: int = 0
    drafted_per_position: list[int] = field(default_factory=list)
    accepted_per_position: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    row_steps: int = 0

    @property
    def tokens_per_step(self) -> float:
        """New tokens per forward pass and row of the batch. Plain decoding has 1."""
        return self.tokens / self.row_steps if self.row_steps else 0.0

    def count_pass(self, outcome: Outcome) -> None:
        """Counts one pass of decoding."""
        verified = outcome.verified
        self.forward_passes += outcome.output.calls
        new_tokens = [0 if ended else new for new, ended in zip(verified.new_tokens, verified.had_ended, strict=True)]
        self.steps.append(sum(new_tokens))
        columns = verified.columns or [range(1 + right) for right in verified.accepted]
        for new, drafts, right, path in zip(new_tokens, outcome.origins, verified.accepted, columns, strict=True):
            if new:
                self._count_row(new, [origin.place for origin in drafts], right)
                self.looked_up += sum(drafts[column - 1].drafter != MASK_DRAFTER for column in path[1:])

    def _count_row(self, tokens: int, places: list[int], accepted: int) -> None:
        """Counts a row's pass: its new tokens, the place of each of its drafts, and how many of these were right."""
        self.row_steps += 1
        self.tokens += tokens
        self.drafted += len(places)
        self.accepted += accepted
        missing = max(places, default=0) - len(self.drafted_per_position)
        self.drafted_per_position += [0] * missing
        self.accepted_per_position += [0] * missing
        for place in places:
            self.drafted_per_position[place - 1] += 1
        for place in range(accepted):
            self.accepted_per_position[place] += 1


@dataclass
class MTPGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(mtp=True, return_dict_in_generate=True)` returns.

    All fields of [`~transformers.generation.GenerateDecoderOnlyOutput`], and:

    Args:
        mtp_statistics ([`MTPStatistics`]): Counts of forward passes, drafts and accepted drafts.
    """

    mtp_statistics: MTPStatistics | None = None
