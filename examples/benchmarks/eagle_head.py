"""A draft head in the manner of EAGLE-1, to compare with: it foresees the base's next state, and drafts from that.

After Li et al., arXiv 2401.15077, and its code: a linear layer joins the embedding of a token with the base's last
state of the token before, and one decoder layer of the base's own kind with a cache of its own predicts the state of
that token. The base's frozen unembedding turns it into a draft, and the head goes on from its own prediction. The
losses are theirs: smooth L1 between states, cross-entropy between distributions, and noise on the states. Two things
differ: the final norm of the base follows the layer, as a start, and the drafts are a chain, not a tree.

Shapes: B texts, T tokens, D features, E size of an embedding, A trained tokens, V vocabulary, S tokens of a text so
far, N columns of a pass.
"""

import copy
import inspect

import torch
from torch import nn
from transformers import AutoModel, DynamicCache

from hf_mtp.base.caches import cache_name
from hf_mtp.base.inspection import decoder_of

NOISE = 0.2 * 512  # width of the uniform noise, times the length of the text
STATE_WEIGHT, TOKEN_WEIGHT = 1.0, 0.1


class EagleHead(nn.Module):
    """A linear layer, and one decoder layer of the base's kind.

    Args:
        base ([`~transformers.PreTrainedModel`]): The model whose states the head foresees.
    """

    def __init__(self, base):
        super().__init__()
        config = copy.deepcopy(base.config.get_text_config(decoder=True))
        config.num_hidden_layers = 1
        embedding, unembedding = base.get_input_embeddings().weight, base.get_output_embeddings().weight
        self.join = nn.Linear(embedding.shape[1] + unembedding.shape[1], config.hidden_size)
        self.decoder = AutoModel.from_config(config, dtype=torch.float32)
        self.decoder.set_input_embeddings(None)  # it reads the base's
        theirs = dict(decoder_of(base).named_parameters())
        with torch.no_grad():
            for name, parameter in self.decoder.named_parameters():
                if "layers." not in name and name in theirs:  # the final norm
                    parameter.copy_(theirs[name])

        self.cache_name = cache_name(inspect.signature(self.decoder.forward).parameters)

    def forward(self, embedding_BTE: torch.Tensor, state_BTD: torch.Tensor, cache=None) -> torch.Tensor:
        """`(B, T, D)`: the states foreseen for tokens, from their embeddings and the states of the tokens before."""
        joined_BTD = self.join(torch.cat([embedding_BTE, state_BTD], dim=-1))
        options = {"use_cache": False} if cache is None else {self.cache_name: cache, "use_cache": True}
        return self.decoder(inputs_embeds=joined_BTD, **options).last_hidden_state

    def learn(self, base, ids_BT: torch.LongTensor, state_BTD: torch.Tensor, is_answer_BT: torch.Tensor) -> dict:
        """Adds the gradients of one step. Arguments and result are those of [`medusa_heads.MedusaHeads.learn`]."""
        unembed, length = base.get_output_embeddings(), ids_BT.shape[1]
        noise_BTD = (torch.rand_like(state_BTD[:, :-1]) - 0.5) * (NOISE / length)
        with torch.no_grad():
            embedding_BTE = base.get_input_embeddings()(ids_BT[:, 1:])
        foreseen_BTD = self(embedding_BTE, state_BTD[:, :-1] + noise_BTD)
        text_A, place_A = is_answer_BT[:, 2:].nonzero(as_tuple=True)  # the token after the foreseen state's
        feature_AD, target_AD = foreseen_BTD[text_A, place_A], state_BTD[text_A, place_A + 1]
        with torch.no_grad():
            target_AV = unembed(target_AD).float()
        logits_AV = unembed(feature_AD).float()
        state_loss = nn.functional.smooth_l1_loss(feature_AD.float(), target_AD.float())
        token_loss = nn.functional.cross_entropy(logits_AV, target_AV.softmax(dim=-1))
        (STATE_WEIGHT * state_loss + TOKEN_WEIGHT * token_loss).backward()
        is_same_A = logits_AV.argmax(dim=-1) == target_AV.argmax(dim=-1)
        accuracy = is_same_A.float().mean().item()
        return {"state_loss": state_loss.item(), "token_loss": token_loss.item(), "accuracy_1": accuracy}


class EagleDrafter:
    """Drafts by the head, one token after the other.

    Args:
        head ([`EagleHead`]): The head, in the base's dtype.
        base ([`~transformers.PreTrainedModel`]): The base.
        count (`int`): Drafts of a pass.
    """

    def __init__(self, head: EagleHead, base, count: int):
        self.head, self.count = head, count
        self.embed, self.unembed = base.get_input_embeddings(), base.get_output_embeddings()

    def begin(self) -> None:
        """A new text has nothing in the head's cache."""
        self.cache = DynamicCache()

    def propose(self, ids_1S: torch.LongTensor, state_1ND: torch.Tensor, cache, room: int) -> list[int]:
        """Drafts for the tokens after the last one of the text. Arguments are those of [`speculation.Drafter`]."""
        columns, drafts = state_1ND.shape[1], []
        foreseen_1D = self._foresee(ids_1S[:, -columns:], state_1ND)  # always: the cache needs every true state
        while len(drafts) < min(self.count, room):
            token_1 = self.unembed(foreseen_1D).argmax(dim=-1)
            drafts.append(token_1.item())
            if len(drafts) < min(self.count, room):
                foreseen_1D = self._foresee(token_1[None], foreseen_1D[:, None])
        if len(drafts) > 1:
            self.cache.crop(1 - len(drafts))  # states that the head only foresaw
        return drafts

    def _foresee(self, token_1N: torch.LongTensor, state_1ND: torch.Tensor) -> torch.Tensor:
        """`(1, D)`: the state foreseen for the last of these tokens."""
        return self.head(self.embed(token_1N), state_1ND, self.cache)[:, -1]
