"""Drafts from the masks' hidden states, with the embedding and the unembedding of vLLM's model.

Shapes: B requests, K masks of each, C candidates, D features, V vocabulary.
"""

import torch
from torch import nn
from vllm.config import VllmConfig

from ...adapter.sampler import SHORTLIST
from .adapter import EMBEDDINGS, IDS, ExportedAdapter
from .arguments import ADAPTER


class Drafter:
    """The class that vLLM loads as `speculative_config={"method": "custom_class", "model": ...}`.

    Args:
        vllm_config (`VllmConfig`): The engine's settings; `additional_config` names the exported adapter.
    """

    def __init__(self, vllm_config: VllmConfig):
        self.k = vllm_config.speculative_config.num_speculative_tokens
        self.adapter = ExportedAdapter.read(vllm_config.additional_config[ADAPTER])
        self.dtype = vllm_config.model_config.dtype

    def load_model(self, model: nn.Module) -> None:
        """Reads the weights. vLLM calls it when the base is loaded.

        Args:
            model (`nn.Module`): vLLM's model.
        """
        self.model = model
        masks, self.sampler = self.adapter.weights(next(model.parameters()).device)
        self.mask_kE = masks[EMBEDDINGS].to(self.dtype) if EMBEDDINGS in masks else model.embed_input_ids(masks[IDS])

    def draft(self, pending_B: torch.LongTensor, hidden_BKD: torch.Tensor) -> torch.LongTensor:
        """Drafts greedily. All ranks of a tensor-parallel group compute the same.

        Args:
            pending_B (`torch.LongTensor` of shape `(B,)`): The token before the first draft.
            hidden_BKD (`torch.Tensor` of shape `(B, K, D)`): Last hidden states of the masks.

        Returns:
            `torch.LongTensor` of shape `(B, K)`: The drafts.
        """
        batch, masks, _ = hidden_BKD.shape
        score_BKV = self.model.compute_logits(hidden_BKD.flatten(0, 1)).view(batch, masks, -1)
        if self.sampler is None:
            return score_BKV.argmax(dim=-1)
        candidate_BKC = score_BKV.topk(min(SHORTLIST, score_BKV.shape[-1]), dim=-1).indices
        refine, drafts = self.sampler.refiner(hidden_BKD), []
        for step, candidate_BC in enumerate(candidate_BKC.unbind(dim=1)):
            feature_BD = refine(step, self.model.embed_input_ids(pending_B))
            score_BC = self.model.compute_logits(feature_BD).gather(1, candidate_BC)
            pending_B = candidate_BC.gather(1, score_BC.argmax(dim=-1, keepdim=True))[:, 0]
            drafts.append(pending_B)
        return torch.stack(drafts, dim=1)

    def propose(self, *args, **kwargs) -> None:
        """What vLLM would call without our worker.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("hf_mtp's drafter needs worker_cls='hf_mtp.serving.vllm.worker.Worker'.")
