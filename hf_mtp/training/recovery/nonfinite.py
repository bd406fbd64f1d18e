"""Losses and gradients that are not finite: the training ends with a report, or the step is left out.

A loss that is not finite makes all gradients of its step NaN. So every process learns of it from the gradients that
they share anyway: none waits for another, and all leave out the same step. Knows nothing of how losses are made.
"""

import math
from typing import Literal, get_args

import torch
from transformers import Trainer
from transformers.utils import logging

from ...objective.compute import Objective

logger = logging.get_logger(__name__)

Nonfinite = Literal["raise", "skip"]
NONFINITE = get_args(Nonfinite)
SHOWN_ROWS, SHOWN_TOKENS = 8, 16  # of a batch in a report


class NonfiniteGuard:
    """Sees that no step is taken on numbers that are not finite.

    Args:
        trainer ([`~transformers.Trainer`]): Whose steps.
        policy (`"raise"` or `"skip"`): Whether such a step ends the training or is left out.

    Raises:
        ValueError: `"skip"` under DeepSpeed.

    Attributes:
        skipped_steps (`int`): How many were left out.
    """

    def __init__(self, trainer: Trainer, policy: Nonfinite):
        if policy == "skip" and trainer.is_deepspeed_enabled:
            raise ValueError(
                "`nonfinite='skip'` cannot leave out a step under DeepSpeed, which takes it before the gradients can "
                "be looked at. Set `nonfinite='raise'`; in float16, DeepSpeed's own loss scaler skips such steps."
            )
        self.trainer, self.policy = trainer, policy
        self.skipped_steps = 0
        self._batches: list[torch.LongTensor] = []  # of the step that is computed
        self._reported = False

    def __call__(self, objective: Objective, input_ids: torch.LongTensor) -> Objective:
        """Looks at what a batch of training gave.

        Args:
            objective ([`Objective`]): Losses of the batch.
            input_ids (`torch.LongTensor` of shape `(B, T)`): The batch, for the report.

        Returns:
            [`Objective`]: The same; or, if it is not finite, one without measures that makes all gradients NaN.

        Raises:
            FloatingPointError: It is not finite, and the policy is `"raise"`.
        """
        self._batches.append(input_ids)
        terms = {name: value for name, value in objective.metrics.items() if name.startswith("loss_")}
        terms["loss"] = objective.loss.detach()
        values = torch.stack([value.float() for value in terms.values()]).tolist()
        broken = [f"{name}={value}" for name, value in zip(terms, values, strict=True) if not math.isfinite(value)]
        if not broken:
            return objective
        self._report(f"The loss of step {self._step} is not finite ({', '.join(broken)})", [input_ids])
        return Objective(objective.loss * math.nan, {}, objective.rows)

    def norm(self, model: torch.nn.Module, norm: torch.Tensor | float | None) -> torch.Tensor | float | None:
        """Looks at the gradients of a step before it is taken, and drops them if they are not finite.

        Args:
            model (`torch.nn.Module`): What is trained.
            norm (`torch.Tensor` or `float`, *optional*): Norm of the gradients, the same in all processes.

        Returns:
            The norm of the gradients that the step is taken with.

        Raises:
            FloatingPointError: It is not finite, and the policy is `"raise"`.
        """
        batches, self._batches = self._batches, []
        reported, self._reported = self._reported, False
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a DTensor
        if norm is None or math.isfinite(norm):
            return norm
        if self.trainer.accelerator.scaler is not None:  # in float16 it leaves out steps, to find its scale
            self.skipped_steps += reported
            return norm
        if not reported:
            self._report(f"The gradients of step {self._step} are not finite, though its losses are", batches)
            self._reported = False
        model.zero_grad()  # to `None`: for such, optimizers do nothing and keep their state
        self.skipped_steps += 1
        return 0.0

    @property
    def _step(self) -> int:
        return self.trainer.state.global_step + 1

    def _report(self, problem: str, batches: list[torch.LongTensor]) -> None:
        self._reported = True
        weights = [p.detach() for p in self.trainer.model.parameters() if p.requires_grad]
        broken = sum(not bool(torch.isfinite(weight).all()) for weight in weights)
        state = f"were not finite before it, in {broken} of {len(weights)} tensors" if broken else "are finite"
        message = (
            f"{problem}. The adapter's weights {state}. The batch, in process {self.trainer.args.process_index}:\n"
            f"{_rows(batches, self.trainer.processing_class)}\n"
        )
        if self.policy == "skip":
            logger.warning(message + "The step is left out (`nonfinite='skip'`).")
            return
        raise FloatingPointError(
            message + f"The step was not taken, and the checkpoints in {self.trainer.args.output_dir} are as they "
            "were. Look at these rows; try a lower `learning_rate` or `max_grad_norm`, or `bf16=True` if it was "
            "float16; on a Hopper GPU `torch.backends.cuda.enable_cudnn_sdp(False)`, since cuDNN's backward pass of "
            "attention gives NaN for some lengths (pytorch/pytorch#196678); or set `nonfinite='skip'` to leave such "
            "steps out."
        )


def _rows(batches: list[torch.LongTensor], processing_class) -> str:
    """How the rows of batches begin, as text."""
    rows = [row for batch in batches for row in batch]
    lines = [f"  row {i}: {processing_class.decode(row[:SHOWN_TOKENS])!r} ..." for i, row in enumerate(rows)]
    more = [f"  and {len(rows) - SHOWN_ROWS} more"] if len(rows) > SHOWN_ROWS else []
    return "\n".join(lines[:SHOWN_ROWS] + more)
