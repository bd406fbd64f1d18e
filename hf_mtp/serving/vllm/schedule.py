"""How many masks requests get: as many as pay for themselves when so many requests share a pass.

It is the rule of `mtp_strategy="auto"`, for chains of drafts: what a pass costs is measured once, and what masks bring
is counted. No single pass is timed, so the ranks of a tensor-parallel group decide alike. Knows nothing of vLLM.
"""

from ...decoding.drafters.acceptance import MaskAcceptance


class MaskSchedule:
    """Chooses the masks of each pass, none if many requests share it.

    Args:
        k (`int`): Most masks per request.

    Attributes:
        costs ([`~hf_mtp.decoding.schedule.costs.PassCosts`] or `None`): What passes cost; until it is known, all
            requests get k masks.
        acceptance ([`~hf_mtp.decoding.drafters.acceptance.MaskAcceptance`]): Acceptance rates of drafts.
    """

    MARGIN = 0.03  # how much fewer plain passes a token must cost with masks
    REST = 64  # passes without masks, after which one request tries them

    def __init__(self, k: int):
        self.k, self.costs = k, None
        self.acceptance, self.rested = MaskAcceptance(k), 0

    def plan(self, requests: int) -> tuple[int, int]:
        """How many requests get masks in the next pass, and how many each.

        Args:
            requests (`int`): Requests that draw a token.
        """
        masks = self._best(requests) if self.costs else self.k
        if masks or not requests:
            self.rested = 0
            return requests, masks
        self.rested += 1
        if self.rested < self.REST:
            return 0, 0
        self.rested = 0
        return 1, self.k

    def observe(self, offered: int, accepted: int) -> None:
        """Counts the drafts of a request that a pass verified, and those of them that it accepted."""
        if offered:
            self.acceptance.count([(offered, accepted)])

    def _best(self, requests: int) -> int:
        prices = [self.price(requests, masks) for masks in range(self.k + 1)]
        best = min(range(self.k + 1), key=prices.__getitem__)
        return best if prices[best] < (1 - self.MARGIN) * prices[0] else 0

    def price(self, requests: int, masks: int) -> float:
        """What a token costs in the long run, in passes over one token.

        Args:
            requests (`int`), masks (`int`): Requests in a pass, and masks of each.
        """
        tokens = 1 + self._verifying(masks) * sum(self.acceptance.survival[:masks])
        return self.costs.of(self.columns(requests, masks), masks > 0) / (requests * tokens)

    def columns(self, requests: int, masks: int) -> float:
        """The mean columns of a pass: pending tokens, masks, and drafts where there are any."""
        return requests * (1 + masks + self._verifying(masks) * masks)

    def _verifying(self, masks: int) -> float:
        """The share of passes that verify drafts. Drafts follow a pass that had none, or accepted all."""
        return 1 / (2 - self.acceptance.survival[masks - 1]) if masks else 0.0
