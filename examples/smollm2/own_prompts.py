"""Prompts that the model writes itself: it goes on after the header of the user's turn.

After Magpie (Xu et al., arXiv 2406.08464). An aligned model that is shown its chat template up to the place where a
user would write, writes what a user could have written.
"""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEMPERATURE, TOP_P = 1.0, 0.95
LONGEST = 96  # tokens; a prompt that has not ended by then is dropped
PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"


@torch.inference_mode()
def write_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, starts: list[str], batch_size: int, seed: int = 0
) -> list[str]:
    """Goes on with each start until the model ends the user's turn.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer, with a chat template.
        starts (`list[str]`): First words of the prompts; empty ones leave all to the model.
        batch_size (`int`): Prompts at a time.
        seed (`int`, *optional*, defaults to 0): Where sampling starts.

    Returns:
        `list[str]`: The prompts that came to an end, fewer than there were starts.
    """
    torch.manual_seed(seed)
    header = user_header(tokenizer)
    starts = sorted(starts, key=len)  # so that little is padded
    prompts = []
    for first in range(0, len(starts), batch_size):
        batch = starts[first : first + batch_size]
        inputs = tokenizer([header + start for start in batch], padding=True, padding_side="left", return_tensors="pt")
        output = model.generate(
            **inputs.to(model.device),
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=0,
            max_new_tokens=LONGEST,
            pad_token_id=tokenizer.pad_token_id,
        )
        for start, ids in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            if tokenizer.eos_token_id in ids:
                rest = ids[: ids.index(tokenizer.eos_token_id)]
                prompts.append((start + tokenizer.decode(rest)).strip())
    return prompts


def user_header(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template's text before a user's first word."""
    conversation = [{"role": "user", "content": PLACE}]
    return tokenizer.apply_chat_template(conversation, tokenize=False).partition(PLACE)[0]
