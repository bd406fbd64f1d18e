"""The four losses, as functions of tensors.

Knows nothing of models, layouts or configs. R rows (supervised masks), D features, V vocabulary, L layers.

References: Samragh et al., arXiv 2507.11851, section 3.3 (base and sampler cross-entropy, latent consistency).
"""

import torch
import torch.nn.functional as F

# Rows whose logits exist at one time: 1024 rows of a 128k vocabulary are half a gigabyte in float32.
ROWS_PER_CHUNK = 1024


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """The same values in a type that sums of many of them need."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, target, reduction="none")


def _total_variation(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    probability = logits.softmax(dim=-1)
    if not target.is_floating_point():  # all of the target's probability is on one token
        return 1 - probability.gather(-1, target[:, None])[:, 0]
    return 0.5 * (probability - target).abs().sum(dim=-1)


# How far what is drafted is from the target. A draft from q is accepted by p with probability 1 - TV(p, q) when
# sampling (Leviathan et al., arXiv 2211.17192, theorem 3.5).
DIVERGENCES = {"kl": _cross_entropy, "tv": _total_variation}


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradient of each chunk of rows in one go: its logits are gone before those of the next are made."""

    @staticmethod
    def forward(ctx, hidden_RD, target_R, unembedding, divergence):
        losses, tops, target_tops, gradients = [], [], [], []
        for hidden, target in zip(hidden_RD.split(ROWS_PER_CHUNK), target_R.split(ROWS_PER_CHUNK), strict=True):
            if target.is_floating_point():
                target = at_least_float32(unembedding(target))
                target_tops.append(target.argmax(dim=-1))
                target = target.softmax(dim=-1)
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[0])
                logits = at_least_float32(unembedding(hidden))
                loss = DIVERGENCES[divergence](logits, target)
                if ctx.needs_input_grad[0]:
                    gradients.append(torch.autograd.grad(loss.sum(), hidden)[0])
            losses.append(loss.detach())
            tops.append(logits.detach().argmax(dim=-1))
        top_R = torch.cat(tops)
        target_top_R = torch.cat(target_tops) if target_tops else target_R.clone()
        ctx.mark_non_differentiable(top_R, target_top_R)
        ctx.save_for_backward(*gradients)
        return torch.cat(losses), top_R, target_top_R

    @staticmethod
    def backward(ctx, loss_gradient_R, *_):
        gradient_RD = torch.cat(ctx.saved_tensors)
        return gradient_RD * loss_gradient_R[:, None].to(gradient_RD.dtype), None, None, None


@torch.compiler.disable  # R varies, and the backward pass is ready-made
def cross_entropy(
    unembedding: torch.nn.Module, hidden_RD: torch.Tensor, target_R: torch.Tensor, divergence: str = "kl"
) -> tuple[torch.Tensor, torch.LongTensor, torch.LongTensor]:
    """Cross-entropy (or another divergence) of `unembedding(hidden)` against the targets, a chunk of rows at a time.

    The unembedding is frozen, so that the gradient of a row depends on that row alone and is computed with its loss:
    at most [`ROWS_PER_CHUNK`] rows of logits exist at one time (twice as many with distributions as targets).
    (`torch.nn.functional.linear_cross_entropy`, in torch since 2.13, takes a bare weight: no bias, no quantization.)

    Args:
        unembedding (`torch.nn.Module`): The base model's output layer, D -> V, frozen.
        hidden_RD (`torch.Tensor` of shape `(R, D)`): Features to unembed.
        target_R (`torch.Tensor`): Token ids, a `torch.LongTensor` of shape `(R,)`; or features of shape `(R, D)` whose
            unembedding gives the distributions to learn.
        divergence (`str`, *optional*, defaults to `"kl"`): `"kl"` for cross-entropy, nats; `"tv"` for the total
            variation distance, 0 to 1.

    Returns:
        `torch.Tensor` of shape `(R,)`, float32; and two `torch.LongTensor` of shape `(R,)`, the likeliest tokens of
        what is unembedded and of the targets.
    """
    return _ChunkedCrossEntropy.apply(hidden_RD, target_R, unembedding, divergence)


@torch.no_grad()
def likeliest_tokens(unembedding: torch.nn.Module, hidden_RD: torch.Tensor) -> torch.LongTensor:
    """`(R,)`: the argmax of `unembedding(hidden)`, a chunk of rows at a time."""
    return torch.cat([unembedding(hidden).argmax(dim=-1) for hidden in hidden_RD.split(ROWS_PER_CHUNK)])


def latent_consistency(mask_RD: torch.Tensor, regular_RD: torch.Tensor) -> torch.Tensor:
    """Mean squared distance between masks' states and the regular states that predict the same token.

    Args:
        mask_RD (`torch.Tensor` of shape `(R, D)`): Last hidden states of masks.
        regular_RD (`torch.Tensor` of shape `(R, D)`): Last hidden states of the regular tokens they stand for. No
            gradient flows into them.

    Returns:
        `torch.Tensor` of shape `(R,)`, float32.
    """
    return (at_least_float32(mask_RD) - at_least_float32(regular_RD.detach())).pow(2).mean(dim=-1)


def feature_consistency(mask_LRD: torch.Tensor, regular_LRD: torch.Tensor) -> torch.Tensor:
    """The same over intermediate layers, each measured in units of the regular state's own mean square.

    Raw states grow by orders of magnitude with depth; the unit makes every layer count.

    Args:
        mask_LRD, regular_LRD (`torch.Tensor` of shape `(L, R, D)`): States after L of the layers.

    Returns:
        `torch.Tensor` of shape `(R,)`, float32, dimensionless.
    """
    regular_LRD = at_least_float32(regular_LRD.detach())
    distance_LR = (at_least_float32(mask_LRD) - regular_LRD).pow(2).mean(dim=-1)
    unit_LR = regular_LRD.pow(2).mean(dim=-1).clamp(min=1e-6)
    return (distance_LR / unit_LR).mean(dim=0)
