"""Handles NaN and infinite losses and gradients: ends training with a report, or skips the step.

A nonfinite loss makes all gradients of its step NaN. Processes share gradients anyway, so each one learns of the loss
without extra communication, and all skip the same step. Knows nothing of how losses are computed.
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
SHOWN_ROWS, SHOWN_TOKENS = 8, 16  # limits of a report


class NonfiniteGuard:
    """Prevents optimizer steps with nonfinite gradients.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer whose steps are checked.
        policy (`"raise"` or `"skip"`): Whether to end training or to skip the step.

    Raises:
        ValueError: `"skip"` with DeepSpeed.

    Attributes:
        skipped_steps (`int`): Number of skipped steps.
    """

    def __init__(self, trainer: Trainer, policy: Nonfinite):
        if policy == "skip" and trainer.is_deepspeed_enabled:
            raise ValueError(
                "`nonfinite='skip'` does not work with DeepSpeed, which takes each step before the gradients can be "
                "checked. Set `nonfinite='raise'`. In float16, DeepSpeed's own loss scaler skips such steps."
            )
        self.trainer, self.policy = trainer, policy
        self.skipped_steps = 0
        self._batches: list[torch.LongTensor] = []  # input ids of the current step
        self._reported = False

    def check_losses(self, objective: Objective, input_ids: torch.LongTensor) -> Objective:
        """Checks the losses of a training batch.

        Args:
            objective ([`Objective`]): Losses of the batch.
            input_ids (`torch.LongTensor` of shape `(B, T)`): The batch, for the report.

        Returns:
            [`Objective`]: The same if it is finite; otherwise one without metrics that makes all gradients NaN.

        Raises:
            FloatingPointError: A loss is not finite, and the policy is `"raise"`.
        """
        self._batches.append(input_ids)
        terms = {name: value for name, value in objective.metrics.items() if name.startswith("loss_")}
        terms["loss"] = objective.loss.detach()
        values = torch.stack([value.float() for value in terms.values()]).tolist()
        nonfinite = [f"{name}={value}" for name, value in zip(terms, values, strict=True) if not math.isfinite(value)]
        if not nonfinite:
            return objective
        self._report(f"The loss of step {self._step} is not finite ({', '.join(nonfinite)})", [input_ids])
        return Objective(objective.loss * math.nan, {}, objective.rows)

    def check_gradients(
        self, model: torch.nn.Module, norm: torch.Tensor | float | None
    ) -> torch.Tensor | float | None:
        """Checks the gradients before an optimizer step, and drops them if they are not finite.

        Args:
            model (`torch.nn.Module`): The model being trained.
            norm (`torch.Tensor` or `float`, *optional*): Norm of the gradients, the same in all processes.

        Returns:
            Norm of the gradients that the step will use.

        Raises:
            FloatingPointError: The norm is not finite, and the policy is `"raise"`.
        """
        batches, self._batches = self._batches, []
        reported, self._reported = self._reported, False
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a DTensor
        if norm is None or math.isfinite(norm):
            return norm
        if self.trainer.accelerator.scaler is not None:  # in float16 the scaler skips steps to find its scale
            self.skipped_steps += reported
            return norm
        if not reported:
            self._report(f"The gradients of step {self._step} are not finite, though its losses are", batches)
            self._reported = False
        model.zero_grad()  # sets them to None, so that optimizers change neither weights nor state
        self.skipped_steps += 1
        return 0.0

    @property
    def _step(self) -> int:
        return self.trainer.state.global_step + 1

    def _report(self, problem: str, batches: list[torch.LongTensor]) -> None:
        self._reported = True
        weights = [p.detach() for p in self.trainer.model.parameters() if p.requires_grad]
        nonfinite = sum(not bool(torch.isfinite(weight).all()) for weight in weights)
        state = "are finite"
        if nonfinite:
            state = f"were already nonfinite before this step, in {nonfinite} of {len(weights)} tensors"
        message = (
            f"{problem}. The adapter's weights {state}. The batch, in process {self.trainer.args.process_index}:\n"
            f"{_rows(batches, self.trainer.processing_class)}\n"
        )
        if self.policy == "skip":
            logger.warning(message + "The step is skipped (`nonfinite='skip'`).")
            return
        raise FloatingPointError(
            message + f"The step was not taken, and the checkpoints in {self.trainer.args.output_dir} are unchanged. "
            "Check these rows; try a lower `learning_rate` or `max_grad_norm`, or `bf16=True` instead of float16; on "
            "a Hopper GPU `torch.backends.cuda.enable_cudnn_sdp(False)`, because cuDNN's backward pass of attention "
            "gives NaN for some lengths (pytorch/pytorch#196678); or set `nonfinite='skip'` to skip such steps."
        )


def _rows(batches: list[torch.LongTensor], processing_class) -> str:
    """The beginning of each row, as text."""
    rows = [row for batch in batches for row in batch]
    lines = [f"  row {i}: {processing_class.decode(row[:SHOWN_TOKENS])!r} ..." for i, row in enumerate(rows)]
    more = [f"  and {len(rows) - SHOWN_ROWS} more"] if len(rows) > SHOWN_ROWS else []
    return "\n".join(lines[:SHOWN_ROWS] + more)
