"""Upgraded models in EleutherAI's lm-evaluation-harness (`pip install "hf_mtp[eval]"`).

Importing this module registers the model type `hf-mtp` with the harness. The harness's own command imports no other
packages, so `python -m hf_mtp.evaluation.harness` registers the type and then runs that command. This module knows
nothing of tasks and scores.
"""

from typing import Any

import torch
from peft import PeftConfig, PeftModel

from ..base.padding import end_tokens, up_to_end
from ..pretrained import is_adapter
from .decoded import checked_config, counted_forward_passes

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        f'hf_mtp.evaluation.harness needs lm-evaluation-harness: pip install "hf_mtp[eval]". {error}'
    ) from error


@register_model("hf-mtp")
class UpgradedLM(HFLM):
    """The harness's own model for `transformers`, with an adapter of hf_mtp.

    Log-likelihoods are the base's. Texts are generated with `mtp=True` where a task or `--gen_kwargs mtp=True` asks
    for it.

    Args:
        pretrained (`str`): Hub id or folder of the base, or of the adapter if `adapter` is `None`.
        adapter (`str`, *optional*): Hub id or folder of the adapter.
        kwargs: Arguments of the harness's `HFLM`, but `peft`. `revision` is that of the base; by default the one that
            the adapter names, if `adapter` is `None`.

    Attributes:
        forward_passes (`int`): Forward passes of the base's decoder in all texts generated so far by this process.
        new_tokens (`int`): Their new tokens, end tokens included.

    Raises:
        ValueError: There is no adapter, it is none of hf_mtp, it does not fit the base, or `peft` was passed.
    """

    def __init__(self, pretrained: str, adapter: str | None = None, **kwargs):
        if kwargs.get("peft"):
            raise ValueError(
                "The model type hf-mtp takes its adapter as `adapter`, but got "
                f"`peft={kwargs['peft']}`. Pass `adapter` instead."
            )
        if adapter is None:
            if not is_adapter(pretrained):
                raise ValueError(
                    f"{pretrained} is a base model without an adapter. Pass its adapter as well: "
                    "adapter=FOLDER_OR_HUB_ID."
                )
            config = PeftConfig.from_pretrained(pretrained)
            adapter, pretrained = pretrained, config.base_model_name_or_path
            kwargs = {"revision": config.revision or "main", **kwargs}
        self.adapter, self.forward_passes, self.new_tokens = adapter, 0, 0
        super().__init__(pretrained, **kwargs)

    def _create_model(self, pretrained: str, **kwargs) -> None:
        # HFLM's own `peft` may resize the base's embedding before it loads an adapter. Ours needs the base as it is.
        super()._create_model(pretrained, **kwargs)
        self._model = PeftModel.from_pretrained(self._model, self.adapter)
        checked_config(self._model)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs) -> torch.Tensor:
        earlier = self.model.mtp_statistics
        with counted_forward_passes(self.model) as forward_passes:
            output_BT = super()._model_generate(context, max_length, stop, **kwargs)
        counts, ends = self.model.mtp_statistics, end_tokens(self.model)
        # Our own counts leave out the short passes by which a first call tries what the model can do.
        self.forward_passes += forward_passes() if counts is earlier else counts.forward_passes
        self.new_tokens += sum(len(up_to_end(row, ends)) for row in output_BT[:, context.shape[1] :].tolist())
        return output_BT

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes of a model beside its scores: also the forward passes and the new tokens."""
        counts = {"generated_forward_passes": self.forward_passes, "generated_tokens": self.new_tokens}
        return {**super().get_model_info(), **counts}


if __name__ == "__main__":
    cli_evaluate()
