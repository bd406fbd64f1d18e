"""`mtp_bitwise=True` returns the text of plain decoding in half precision, where other passes round differently."""

import pytest
import torch
import torch.nn.functional as F
from oracle import RIGHT, Oracle
from tiny_models import CACHE, generate, prompt, tiny_base, upgraded
from transformers import GenerationConfig, StaticCache

from hf_mtp.cache.column_attention import ColumnAttention, KeysByColumn
from hf_mtp.cache.rollback import RollbackCache
from hf_mtp.decoding.generate import GenerationMixin
from hf_mtp.layout.blocks import decoding_layout
from hf_mtp.layout.mask_plan import no_masks, whole_blocks
from hf_mtp.passes import bitwise, summation_order
from hf_mtp.passes.bitwise import OrderedProducts
from hf_mtp.passes.decoding_pass import DecodingPass
from hf_mtp.passes.summation_order import rows_in_order

K, PROMPT, NEW = 3, 11, 40
WIDE = {"hidden_size": 128, "intermediate_size": 320, "max_position_embeddings": 256}  # sums long enough to differ
ARCHITECTURES = ["cohere", "falcon", "gpt2", "gpt_neox", "granite", "llama", "olmo2", "opt", "phi3", "qwen2", "qwen3"]


@pytest.fixture(autouse=True)
def no_memory(monkeypatch):
    monkeypatch.setattr(summation_order, "_known", {})


# ---------------------------------------------------------------- how many rows keep the order


def folding_product(weight_OI: torch.Tensor, most: int, reference: int = 1):
    """A product that sums from the back if it has more than `most` rows, and fewer than any reference."""

    def product(x: torch.Tensor) -> torch.Tensor:
        x_nI = x.flatten(0, -2).float()
        order = torch.arange(x_nI.shape[1])
        order = order if len(x_nI) <= most else order.flip(0)
        total = torch.zeros(len(x_nI), len(weight_OI))
        for feature in order.tolist():
            total += x_nI[:, feature, None] * weight_OI[:, feature].float()
        return total.to(x.dtype).view(*x.shape[:-1], -1)

    return product


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("most", [1, 4, 17, 100])
def test_the_most_rows_that_keep_the_order_are_found(most, dtype, dims):
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    product = folding_product(weight, most)
    assert rows_in_order(product, weight, dims, rows=20) == min(most, 20)
    assert rows_in_order(product, weight, dims, rows=3) == (3 if most > 1 else 1)


def test_no_rows_keep_the_order_of_a_batch_that_has_none():
    weight = torch.randn(24, 48).bfloat16()

    def by_place(x):  # the last row of several is summed from the back
        found = [folding_product(weight, most=1)(row[None]) for row in x.flatten(0, -2)]
        if len(found) > 1:
            found[-1] = folding_product(weight, most=0)(x.flatten(0, -2)[-1:])
        return torch.cat(found).view(*x.shape[:-1], -1)

    assert rows_in_order(by_place, weight, 3, rows=8, reference=4) == 0
    assert rows_in_order(by_place, weight, 3, rows=8, reference=1) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 64), (96, 512), (576, 1536)])
def test_products_of_so_many_rows_are_those_of_single_rows(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(dtype)
    rows = rows_in_order(lambda x: F.linear(x, weight), weight, 3, rows=33)
    for _ in range(20):
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        one_by_one = torch.cat([F.linear(row[None, None], weight)[0] for row in x])
        assert torch.equal(F.linear(x[None], weight)[0], one_by_one)


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("batch", "regular", "masks"), [(1, 7, 2), (1, 7, 20), (1, 5, 2), (3, 5, 4)])
def test_products_have_as_many_rows_as_keep_the_order(batch, regular, masks, dims, is_whole, monkeypatch):
    base, most, sizes = tiny_base("llama"), 4, []
    weight = base.lm_head.weight
    monkeypatch.setattr(bitwise, "rows_in_order", lambda *args: most)

    def product(rows: torch.Tensor, bias: None) -> torch.Tensor:
        assert rows.dim() == dims or len(sizes) * most >= batch * regular
        sizes.append(rows.shape[-2])
        return F.linear(rows, weight)

    x = torch.randn(batch, regular + masks * is_whole, 32)
    products = OrderedProducts(base, batch, regular, masks)
    found = products._product(product, x if dims == 3 else x.flatten(0, 1), weight, None)
    torch.testing.assert_close(found.view(*x.shape[:2], -1), F.linear(x, weight))
    of_regular = -(-batch * regular // most)
    assert sizes[:of_regular] == [most] * of_regular
    assert len(sizes) <= of_regular + 1
    assert not products.are_whole


def test_products_follow_plain_decoding_where_no_number_of_rows_keeps_the_order(monkeypatch):
    base, shapes = tiny_base("llama"), []
    monkeypatch.setattr(bitwise, "rows_in_order", lambda *args: 0)

    def product(rows: torch.Tensor, bias: None) -> torch.Tensor:
        shapes.append(tuple(rows.shape))
        return F.linear(rows, base.lm_head.weight)

    x = torch.randn(3, 6, 32)
    found = OrderedProducts(base, batch=3, regular=4, masks=2)._product(product, x, base.lm_head.weight, None)
    torch.testing.assert_close(found, F.linear(x, base.lm_head.weight))
    assert shapes == [(3, 1, 32)] * 4 + [(3, 2, 32)]


# ---------------------------------------------------------------- attention


def test_columns_attend_to_the_keys_of_plain_decoding():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, n, 16, generator=generator).bfloat16() for n in (6, 40, 40))
    allowed = torch.ones(2, 1, 6, 40, dtype=torch.bool).tril(30)
    allowed[1, :, 3, 31:33] = False  # a branch: its keys are not in sequence
    for mask in (allowed, torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo().min).bfloat16()):
        keys = KeysByColumn.of(key, ColumnAttention(regular=4, columns=6))
        found = F.scaled_dot_product_attention(query, keys[:, :, :].expand(2, 4, 40, 16), value, attn_mask=mask)
        assert type(found) is torch.Tensor
        for row in range(2):
            for column in range(4):
                seen = allowed[row, 0, column].nonzero()[:, 0]
                inputs = query[row : row + 1, :, column : column + 1], key[row : row + 1, :, seen]
                alone = F.scaled_dot_product_attention(*inputs, value[row : row + 1, :, seen])
                assert torch.equal(found[row, :, column], alone[0, :, 0])
        of_masks = F.scaled_dot_product_attention(query[:, :, 4:], key, value, attn_mask=mask[:, :, 4:])
        assert torch.equal(found[:, :, 4:], of_masks)


def test_other_uses_of_the_keys_return_plain_tensors():
    keys = KeysByColumn.of(torch.randn(1, 2, 3, 4), ColumnAttention(regular=1, columns=2))
    assert type(keys.reshape(1, 2, 12).contiguous()) is KeysByColumn
    assert type(keys + 1) is type(keys.float() @ keys.transpose(2, 3)) is torch.Tensor


# ---------------------------------------------------------------- passes


@torch.no_grad()
def pass_over(model, ids: torch.LongTensor, columns: int, bitwise: bool) -> tuple[torch.Tensor, RollbackCache]:
    """Logits of the last columns, in one pass with masks or in passes over one column, and the cache."""
    rows, k = len(ids), model.base_model.active_mtp_config.k
    forward, cache = DecodingPass(model.base_model, bitwise=bitwise), RollbackCache(torch.zeros_like(ids[:, 0]))
    prompt_columns = ids.shape[1] - columns
    layout = decoding_layout(
        cache.rows.next_places(prompt_columns), no_masks(rows, 1, k, ids.device), prompt_columns - 1
    )
    forward(ids[:, :prompt_columns], layout, cache, logits_rows=1)
    cache.keep([prompt_columns] * rows)
    plan = whole_blocks(torch.full((rows,), columns - 1), columns - 1, k, linear=False)
    layout = decoding_layout(cache.rows.next_places(columns), plan)
    return forward(ids[:, prompt_columns:], layout, cache, logits_rows=columns).logits_BRV, cache


@torch.no_grad()
def one_by_one(model, ids: torch.LongTensor, columns: int) -> torch.Tensor:
    outputs = model(input_ids=ids[:, :-columns], use_cache=True)
    logits = []
    for column in ids[:, -columns:].split(1, dim=1):
        outputs = model(input_ids=column, use_cache=True, **{CACHE: outputs[CACHE]})
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_equal_bit_by_bit(dtype, rows):
    base = tiny_base("llama", dtype, **WIDE)
    model, ids = upgraded(base, k=3), prompt(90, rows)
    expected = one_by_one(base, ids, columns=7)
    assert torch.equal(pass_over(model, ids, 7, bitwise=True)[0], expected)
    if torch.equal(pass_over(model, ids, 7, bitwise=False)[0], expected):
        pytest.skip("on this machine, wide passes round as narrow ones do")


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("strategy", ["quadratic", "linear", "auto"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_is_that_of_plain_decoding(architecture, strategy, monkeypatch):
    model = upgraded(tiny_base(architecture, torch.bfloat16), k=4)
    expected = generate(model, prompt(PROMPT), NEW)
    Oracle(monkeypatch, expected, RIGHT["sometimes"])
    output = generate(model, prompt(PROMPT), NEW, mtp=True, mtp_strategy=strategy, mtp_bitwise=True)
    assert torch.equal(output, expected)
    assert strategy == "auto" or 0 < model.mtp_statistics.accepted < model.mtp_statistics.drafted


def leaves_plain_decoding(model, seed: int, monkeypatch, **options) -> bool:
    input_ids = prompt(PROMPT, seed=seed)
    expected = generate(model, input_ids, NEW)
    Oracle(monkeypatch, expected, RIGHT["sometimes"])
    try:
        return not torch.equal(
            generate(model, input_ids, NEW, mtp=True, mtp_strategy="quadratic", **options), expected
        )
    except AssertionError:  # of the oracle, which knows one text only
        return True


def test_without_it_texts_leave_plain_decoding(monkeypatch):
    model = upgraded(tiny_base("gpt2", torch.bfloat16), k=4)
    left = [seed for seed in range(8) if leaves_plain_decoding(model, seed, monkeypatch)]
    if not left:
        pytest.skip("on this machine, wide passes round as narrow ones do")
    assert not any(leaves_plain_decoding(model, seed, monkeypatch, mtp_bitwise=True) for seed in left)


def test_a_batch(monkeypatch):
    model = upgraded(tiny_base("llama", torch.bfloat16), k=4)
    expected = generate(model, prompt(PROMPT, rows=3), NEW)
    Oracle(monkeypatch, expected, RIGHT["sometimes"])
    output = generate(model, prompt(PROMPT, rows=3), NEW, mtp=True, mtp_strategy="quadratic", mtp_bitwise=True)
    assert torch.equal(output, expected)


def test_one_seed_gives_one_sampled_text_in_half_precision(monkeypatch):
    model = upgraded(tiny_base("gpt2", torch.bfloat16), k=4)
    texts = [
        model.generate(
            prompt(PROMPT),
            mtp=True,
            mtp_bitwise=True,
            mtp_strategy=strategy,
            mtp_k=k,
            do_sample=True,
            max_new_tokens=NEW,
            generator=torch.Generator().manual_seed(3),
        )
        for strategy, k in (("quadratic", 4), ("quadratic", 2), ("linear", 3), ("auto", 4))
    ]
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_as_an_attribute_of_the_generation_config(monkeypatch):
    model, asked = upgraded(tiny_base("llama", torch.bfloat16)), []
    monkeypatch.setattr("hf_mtp.decoding.call.refuse_unless_bitwise", lambda tuner, rows: asked.append(rows))
    config = GenerationConfig(max_new_tokens=4)
    config.mtp = config.mtp_bitwise = True
    model.generate(prompt(PROMPT, rows=2), generation_config=config)
    assert asked == [2]


def test_returned_cache_is_that_of_plain_decoding(monkeypatch):
    model = upgraded(tiny_base("llama", torch.bfloat16), k=3)
    plain = generate(model, prompt(PROMPT), NEW, return_dict_in_generate=True)
    Oracle(monkeypatch, plain.sequences, RIGHT["sometimes"])
    fast = generate(model, prompt(PROMPT), NEW, mtp=True, mtp_bitwise=True, return_dict_in_generate=True)
    for ours, theirs in zip(fast[CACHE].layers, plain[CACHE].layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert type(ours.keys) is torch.Tensor


# ---------------------------------------------------------------- what it does not support


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("llama", {"cache_implementation": "static"}, "a static cache"),
        ("llama", {"attention_mask": torch.tensor([[0] + [1] * (PROMPT - 1)])}, "padded prompts"),
        ("llama", {"prefill_chunk_size": 4}, "`prefill_chunk_size`"),
        ("mistral", {}, "the window of 7 tokens"),
        ("bloom", {}, "plain sequences only"),
    ],
)
def test_requests_that_cannot_be_bitwise_are_refused(architecture, options, message):
    model = upgraded(tiny_base(architecture, torch.bfloat16))
    with pytest.raises(NotImplementedError, match=message):
        generate(model, prompt(PROMPT), mtp=True, mtp_bitwise=True, **options)


def test_a_static_cache_of_ones_own_is_refused():
    model = upgraded(tiny_base("llama", torch.bfloat16))
    own = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(NotImplementedError, match="a static cache"):
        generate(model, prompt(PROMPT), mtp=True, mtp_bitwise=True, **{CACHE: own})


def test_autocast_is_refused():
    model = upgraded("llama")
    with torch.autocast("cpu"), pytest.raises(NotImplementedError, match="autocast"):
        generate(model, prompt(PROMPT), mtp=True, mtp_bitwise=True)


@pytest.mark.parametrize("columns", [1 + 4 + K, 1 + 9 + K], ids=["short pass", "long pass"])
def test_a_model_that_rounds_some_passes_differently_is_refused(columns):
    base = tiny_base("llama", torch.bfloat16, **WIDE)
    base.get_decoder().layers[0].mlp.register_forward_hook(  # stands for a kernel that depends on the columns
        lambda layer, args, output: output * (1 + 0.01 * (output.shape[1] == columns))
    )
    with pytest.raises(NotImplementedError, match="`mtp_bitwise=True` cannot be guaranteed for LlamaForCausalLM"):
        generate(upgraded(base, K), prompt(PROMPT), mtp=True, mtp_bitwise=True)


def test_the_argument_is_one_of_generates():
    assert "mtp_bitwise" in GenerationMixin.generate.__doc__
