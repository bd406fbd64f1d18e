"""Text that comes token by token is that of all tokens, also where bytes are no characters, or not yet."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_mtp.base.token_text import TokenText
from hf_mtp.cli.session import PiecePrinter
from hf_mtp.decoding.streaming import DraftToken
from hf_mtp.demo.lane import DraftTexts
from hf_mtp.serving.text import TextStream

END, BYTE, LETTER = 2, 3, 259  # the ids of the end token, and of the first byte and letter
LETTERS = ("▁", "▁the", "a", "é", "섬", ".")


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama's and Gemma's: characters that are not in the vocabulary are tokens of one byte each."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def of_bytes() -> PreTrainedTokenizerFast:
    """As GPT-2's: every byte is a letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"</s>": 0} | {byte: i + 1 for i, byte in enumerate(alphabet)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """One token if the vocabulary has it, else its bytes."""
    return [tokenizer.vocab[text]] if text in LETTERS else [BYTE + byte for byte in text.encode()]


def whole(text: TokenText, tokens: list[int]) -> str:
    return "".join(text.step(token) for token in tokens) + text.end()


def test_whole_characters_have_the_text_of_all_at_once():
    tokenizer, generator = with_byte_fallback(), random.Random(0)
    for _ in range(300):
        names = generator.choices([*LETTERS, *"ñ漢😀"], k=generator.randint(1, 9))
        tokens = [id for name in names for id in ids_of(tokenizer, name)] + [END]
        true = tokenizer.decode(tokens, skip_special_tokens=True)
        assert whole(TokenText(tokenizer.backend_tokenizer), tokens) == true


def test_random_bytes_have_the_text_of_all_at_once():
    tokenizer, generator = of_bytes(), random.Random(0)
    for _ in range(300):
        tokens = generator.choices(range(len(tokenizer)), k=generator.randint(1, 12))
        true = tokenizer.decode(tokens, skip_special_tokens=True)
        assert whole(TokenText(tokenizer.backend_tokenizer), tokens) == true


def test_a_text_that_is_cut_within_a_character_ends_as_that_of_all_at_once():
    tokenizer = with_byte_fallback()
    tokens = [*ids_of(tokenizer, "a"), *ids_of(tokenizer, "😀")[:2]]
    text = TokenText(tokenizer.backend_tokenizer)
    assert [text.step(token) for token in tokens] == ["a", "", ""]
    assert text.end() == "��" and text.end() == ""
    assert tokenizer.decode(tokens) == "a��"


INVALID = [BYTE + ord("H"), BYTE + 0x80]  # a byte that no character has here takes back the H


def test_text_goes_on_after_bytes_that_are_no_characters():
    tokenizer = with_byte_fallback()
    text = TokenText(tokenizer.backend_tokenizer)
    tokens = [*INVALID, *ids_of(tokenizer, "é"), *ids_of(tokenizer, "▁the")]
    assert tokenizer.decode(tokens) == "��é the"
    assert [text.step(token) for token in tokens] == ["H", "", "�é", " the"]


def test_a_server_goes_on_after_bytes_that_are_no_characters():
    tokenizer = with_byte_fallback()
    text = TextStream(tokenizer.backend_tokenizer, ["."])
    tokens = [*INVALID, *ids_of(tokenizer, "é"), *ids_of(tokenizer, "."), *ids_of(tokenizer, "a")]
    assert text.feed(tokens) == "H�é" and text.is_stopped and text.tokens == 4


def test_a_streamed_response_has_the_rest_of_its_text():
    tokenizer = with_byte_fallback()
    cut = ids_of(tokenizer, "😀")[:3]
    text = TextStream(tokenizer.backend_tokenizer, ["a�"])
    assert text.feed([*ids_of(tokenizer, "é"), *cut]) + text.end() == "é���"
    text = TextStream(tokenizer.backend_tokenizer, ["a�"])
    assert text.feed([*ids_of(tokenizer, "a"), *cut]) + text.end() == ""  # what was held back is a stop string


def test_a_command_prints_bytes_that_are_no_characters():
    tokenizer, shown = with_byte_fallback(), []
    printer = PiecePrinter(tokenizer, shown.append, in_passes=False)
    for token in [END, *INVALID, *ids_of(tokenizer, "é"), *ids_of(tokenizer, "漢")[:1]]:  # the first is the prompt
        printer.put(torch.tensor([token]))
    printer.end()
    assert shown == ["H", "�é", "�"]


@pytest.mark.parametrize("before", [INVALID, [LETTER + 2, BYTE + 0xF0]])
def test_drafts_after_bytes_that_are_no_characters_have_their_own_text_only(before):
    tokenizer = with_byte_fallback()
    drafts = [DraftToken(token, parent) for parent, token in enumerate(ids_of(tokenizer, "é") * 2)]
    shown = [draft.text for draft in DraftTexts(tokenizer).of_drafts(before, drafts)]
    assert shown == ["�é", "é"]
