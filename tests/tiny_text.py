"""A tiny tokenizer and tiny texts, made in memory."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
PROBE = "abcdef"  # what transformers asks a tokenizer for when it prepares stop strings

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' <eos> ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def tiny_tokenizer(size: int = 97) -> PreTrainedTokenizerFast:
    """Words `w6` to `w{size - 1}`, each the token of that id; ids 0 to 4 are special."""
    known = [*SPECIAL, PROBE]
    vocabulary = {word: i for i, word in enumerate(known)} | {f"w{i}": i for i in range(len(known), size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
    )


def words(length: int, start: int = 0) -> str:
    """Words that count on by threes: easy to learn, and different from each `start`."""
    return " ".join(f"w{6 + (start + 3 * i) % 91}" for i in range(length))
