"""The settings of a race, and their checks."""

from dataclasses import dataclass

from ..decoding.generate import STRATEGIES

SLOW_PAUSE = 0.4  # seconds after each pass in slow motion
HOTTEST = 2.0


@dataclass(frozen=True)
class RaceSettings:
    """Settings of one race.

    Args:
        prompt (`str`): What the user says; the text to continue if the model does not chat.
        max_new_tokens (`int`, *optional*, defaults to 128): Most new tokens of each side.
        k (`int`, *optional*, defaults to 8): Masks per block, as `mtp_k` of `generate`.
        strategy (`str`, *optional*, defaults to `"auto"`): As `mtp_strategy` of `generate`.
        temperature (`float`, *optional*, defaults to 0): Greedy decoding if 0.
        seed (`int`, *optional*, defaults to 0): Seed of sampling.
        bitwise (`bool`, *optional*, defaults to `False`): As `mtp_bitwise` of `generate`.
        slow (`bool`, *optional*, defaults to `False`): Whether to pause after each pass. The clocks do not count it.
    """

    prompt: str
    max_new_tokens: int = 128
    k: int = 8
    strategy: str = "auto"
    temperature: float = 0.0
    seed: int = 0
    bitwise: bool = False
    slow: bool = False

    def refuse_unless_valid(self, most_k: int) -> None:
        """Raises for settings that no race can be run with.

        Args:
            most_k (`int`): The adapter's k.

        Raises:
            ValueError: The prompt is empty, or a number is out of range.
        """
        if not self.prompt.strip():
            raise ValueError("The prompt is empty. Write something for the model to answer.")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"The strategy must be one of {', '.join(STRATEGIES)}, but got {self.strategy!r}.")
        for name, value, least, most in (
            ("Masks per block (k)", self.k, 1, most_k),
            ("The number of new tokens", self.max_new_tokens, 1, 2**20),
            ("The temperature", self.temperature, 0, HOTTEST),
            ("The seed", self.seed, 0, 2**63 - 1),
        ):
            if value is None or not least <= value <= most:
                limits = f"from {least} up" if most >= 2**20 else f"from {least} to {most}"
                raise ValueError(f"{name} must be a number {limits}, but got {value}.")


def refuse_unless_fits(prompt_tokens: int, new_tokens: int, context: int) -> None:
    """Raises for a text that is longer than a model can read.

    Args:
        prompt_tokens (`int`), new_tokens (`int`): Its prompt, and the most new tokens.
        context (`int`): The most tokens that the model can read.

    Raises:
        ValueError: It is longer.
    """
    surplus = prompt_tokens + new_tokens - context
    if surplus > 0:
        raise ValueError(
            f"The prompt has {prompt_tokens} tokens and the answer may have {new_tokens}, but this model supports at "
            f"most {context} in total. Shorten the prompt or lower the number of new tokens, by {surplus} in total."
        )
