"""The values of `--strategy` for verbs that take one."""

from enum import Enum


class Strategy(str, Enum):
    """How to decode, as `mtp_strategy` of `generate`."""

    AUTO = "auto"
    QUADRATIC = "quadratic"
    LINEAR = "linear"
