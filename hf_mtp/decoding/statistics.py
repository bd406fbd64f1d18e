"""Counts of speculative decoding. Knows nothing of time."""

from dataclasses import dataclass, field

from transformers.generation import GenerateDecoderOnlyOutput

from .outcome import Outcome


@dataclass
class MTPStatistics:
    """Counts of one `generate(mtp=True)`.

    Args:
        forward_passes (`int`): Forward passes of the base model, the one over the prompt included.
        tokens (`int`): New tokens returned.
        drafted (`int`): Drafts that were verified.
        accepted (`int`): Drafts that were accepted and returned.
        looked_up (`int`): Accepted drafts that were n-grams of the text; the others came from masks.
        drafted_per_position, accepted_per_position (`list[int]`): The same for the first, second ... draft of a step.
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
        for new, offered, right, source in zip(
            new_tokens, verified.offered, verified.accepted, outcome.source_of_row, strict=True
        ):
            if new:
                self._count_row(new, offered, right)
                self.looked_up += right if source > 0 else 0  # the first drafter drafts from masks

    def _count_row(self, tokens: int, drafted: int, accepted: int) -> None:
        self.row_steps += 1
        self.tokens += tokens
        self.drafted += drafted
        self.accepted += accepted
        missing = drafted - len(self.drafted_per_position)
        self.drafted_per_position += [0] * missing
        self.accepted_per_position += [0] * missing
        for position in range(drafted):
            self.drafted_per_position[position] += 1
            self.accepted_per_position[position] += position < accepted


@dataclass
class MTPGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(mtp=True, return_dict_in_generate=True)` returns.

    All fields of [`~transformers.generation.GenerateDecoderOnlyOutput`], and:

    Args:
        mtp_statistics ([`MTPStatistics`]): Counts of forward passes, drafts and accepted drafts.
    """

    mtp_statistics: MTPStatistics | None = None
