"""Prompts of every kind: positions that do not count up from 0, the model's last ones, rotary embeddings that change
with the length, images."""

import functools

import pytest
import torch
from tiny_models import CACHE, tiny_base, upgraded
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    LlavaConfig,
    MllamaConfig,
    Qwen2_5_VLConfig,
    SmolVLMConfig,
)

from hf_mtp.base.caches import copied
from hf_mtp.base.tiny import tiny_model
from hf_mtp.decoding import loop
from hf_mtp.decoding.schedule.costs import PassCosts
from hf_mtp.evaluation.support import Rehearsal

SMALL, PROMPT = 40, 11
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.5, 3.0, 4.0],
        "original_max_position_embeddings": 20,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
STRATEGIES = ("quadratic", "linear", "auto")


def text(length: int = PROMPT, rows: int = 1) -> torch.LongTensor:
    return torch.randint(1, SMALL - 3, (rows, length), generator=torch.Generator().manual_seed(0))


def generate(model, **arguments):
    # Copies, because `generate` may keep what it is given.
    arguments = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    arguments = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **arguments}
    return model.generate(**arguments)


def assert_exact(model, strategy: str, **arguments) -> None:
    """With drafts that are right, wrong and missing in turns."""
    plain = generate(model, **arguments)
    model.base_model.draft = Rehearsal([row[None] for row in plain])
    assert torch.equal(generate(model, **arguments, mtp=True, mtp_strategy=strategy), plain)
    if strategy != "auto":
        assert model.base_model.mtp_statistics.drafted


def small(architecture: str, **options):
    return upgraded(tiny_base(architecture, torch.float64, vocab_size=SMALL, **options), k=3, dtype=torch.float64)


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt2", "opt", "gpt_neox"])
def test_positions_that_start_above_0(architecture, strategy):
    positions = torch.arange(PROMPT)[None] + 30
    model = small(architecture)
    plain = generate(model, input_ids=text())
    assert_exact(model, strategy, input_ids=text(), position_ids=positions)
    if architecture in ("gpt2", "opt"):  # absolute ones: it is not for nothing
        assert not torch.equal(generate(model, input_ids=text(), position_ids=positions), plain)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_positions_with_gaps_and_padding(architecture, strategy):
    ids = text(rows=2)
    mask, positions = torch.ones_like(ids), torch.arange(PROMPT).expand(2, -1).clone()
    positions[0, 5:] += 7
    mask[1, :3], positions[1] = 0, torch.tensor([0, 0, 0, 2, 3, 5, 8, 9, 10, 11, 12])
    assert_exact(small(architecture), strategy, input_ids=ids, attention_mask=mask, position_ids=positions)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_learned_positions_up_to_the_last(architecture, strategy):
    name = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    assert_exact(small(architecture, **{name: PROMPT + 24}), strategy, input_ids=text())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rope", ROPES)
def test_rotary_embeddings_that_change_with_the_length(rope, strategy):
    model = small("llama", rope_parameters=ROPES[rope], max_position_embeddings=64)
    assert_exact(model, strategy, input_ids=text())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_rotary_embeddings_past_the_last_position(rope, strategy):
    model = small("llama", rope_parameters=ROPES[rope], max_position_embeddings=20)
    assert_exact(model, strategy, input_ids=text())


@pytest.mark.parametrize("steepness", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_tree_of_drafts_does_not_cross_a_change_of_embeddings(rope, steepness, monkeypatch):
    # Columns so cheap that trees have more of them than there are positions left.
    costs = PassCosts([(1, 1.0), (17, 1.0 + steepness)], [(3, 1.0 + steepness / 4), (41, 1.0 + steepness)])
    monkeypatch.setattr(loop, "measure_costs", lambda *args, **options: costs)
    model = small("llama", rope_parameters=ROPES[rope], max_position_embeddings=64 if rope == "longrope" else 20)
    assert_exact(model, "auto", input_ids=text())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("gaps", [[], [(1, 4)]])
def test_the_longest_row_decides_which_embeddings_a_batch_gets(rope, strategy, padding, gaps, monkeypatch):
    costs = PassCosts([(1, 1.0), (4, 1.1)], [(3, 1.1), (41, 1.4)], gaps)
    monkeypatch.setattr(loop, "measure_costs", lambda *args, **options: costs)
    model = small("llama", rope_parameters=ROPES[rope], max_position_embeddings=64 if rope == "longrope" else 20)
    ids = text(rows=3)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    plain = generate(model, input_ids=ids, attention_mask=mask)
    output = generate(model, input_ids=ids, attention_mask=mask, mtp=True, mtp_strategy=strategy)
    assert torch.equal(output, plain)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_static_cache_does_not_cross_a_change_of_embeddings(rope):
    model = small("llama", rope_parameters=ROPES[rope], max_position_embeddings=20)
    with pytest.raises(NotImplementedError, match="change at 20 tokens, and the sequence may reach 34"):
        generate(model, input_ids=text(), mtp=True, cache_implementation="static")
    assert_exact(model, "quadratic", input_ids=text(), max_new_tokens=8, cache_implementation="static")


def phi(**options):
    """Plain decoding with Phi-3 reads the whole text again where its rotary embeddings change."""
    long = {"rope_parameters": ROPES["longrope"], "original_max_position_embeddings": 20}
    return small("phi3", max_position_embeddings=64, **long, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("length", [11, 19, 20, 21])
def test_a_model_that_reads_its_text_again_where_its_embeddings_change(length, strategy):
    assert_exact(phi(), strategy, input_ids=text(length))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ends", [False, True])
def test_a_batch_that_is_read_again(ends, strategy, monkeypatch):
    # A tree that is wider than deep, next to the padding of the row that ended.
    costs = PassCosts([(1, 1.0), (8, 1.074)], [(3, 1.4525), (8, 1.7388)], [(1, 8)])
    monkeypatch.setattr(loop, "measure_costs", lambda *args, **options: costs)
    model, ids = phi(), text(rows=3)
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options["attention_mask"][1, :5] = 0
    if ends:  # one row, before the text is read again
        options["eos_token_id"] = int(generate(model, **options)[2, PROMPT + 3])
    assert_exact(model, strategy, **options)


def test_a_text_that_is_read_again_returns_its_states_and_cache():
    options = {"input_ids": text(), "return_dict_in_generate": True, "output_hidden_states": True}
    model = phi()
    plain = generate(model, **options)
    model.base_model.draft = Rehearsal([plain.sequences])
    output = generate(model, **options, mtp=True, mtp_strategy="quadratic")
    assert torch.equal(output.sequences, plain.sequences)
    for found, expected in zip(output.hidden_states, plain.hidden_states, strict=True):
        for pair in zip(found, expected, strict=True):
            torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-5)
    for one, other in zip(getattr(output, CACHE).layers, getattr(plain, CACHE).layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-3, atol=1e-5)


def test_the_decode_loop_cannot_read_again_what_it_has_not_read_itself():
    model = phi()
    first = generate(model, input_ids=text(), max_new_tokens=4, return_dict_in_generate=True)
    filled, later = getattr(first, CACHE), {"position_ids": torch.arange(PROMPT)[None] + 2}
    for options in ({"input_ids": first.sequences, CACHE: copied(filled)}, {"input_ids": text(), **later}):
        with pytest.raises(NotImplementedError, match="change at 20 tokens, where it reads the whole text again"):
            generate(model, **options, mtp=True)
    short = {"input_ids": first.sequences, "max_new_tokens": 5}  # and the last of 20 tokens is never read
    expected = generate(model, **short, **{CACHE: copied(filled)})
    assert torch.equal(generate(model, **short, **{CACHE: copied(filled)}, mtp=True), expected)


# ---------------------------------------------------------------- attention that is scaled by the column


def llama4():
    config = AutoConfig.for_model(
        "llama4_text",
        **{**TEXT, "num_local_experts": 2, "moe_layers": [], "intermediate_size_mlp": 48},
        no_rope_layers=[1, 0],
        layer_types=["chunked_attention", "full_attention"],
        attention_chunk_size=64,
        floor_scale=20,
        attn_scale=4.0,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    return upgraded(base, k=3, dtype=torch.float64)


@pytest.mark.parametrize("length", [10, 16])
def test_no_draft_of_a_tree_is_scaled_like_a_later_token(length, monkeypatch):
    # Columns so cheap that trees are wider than deep.
    costs = PassCosts([(1, 1.0), (17, 1.01)], [(3, 1.0025), (41, 1.01)])
    monkeypatch.setattr(loop, "measure_costs", lambda *args, **options: costs)
    assert_exact(llama4(), "auto", input_ids=text(length))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("padding", [0, 5])
def test_no_row_is_scaled_like_a_longer_one(padding, strategy):
    ids = text(13, rows=3)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    assert_exact(llama4(), strategy, input_ids=ids, attention_mask=mask)


# ---------------------------------------------------------------- images

TEXT = {
    "vocab_size": SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.3,
}
IMAGE = SMALL - 1


def image_model(name: str):
    """A vision-language model and a prompt with one image: inputs of `generate`."""
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if name == "llava":
        config = LlavaConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
            image_token_id=IMAGE,
            image_seq_length=4,
            vision_feature_layer=-1,
        )
        inputs, places = {"pixel_values": pixels}, 4
    elif name == "gemma3":
        config = Gemma3Config(
            text_config={**TEXT, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            image_token_id=IMAGE,
            boi_token_index=SMALL - 2,
            eoi_token_index=SMALL - 3,
            tie_word_embeddings=False,
        )
        inputs, places = {"pixel_values": pixels}, 4
    elif name == "qwen2_5_vl":
        config = Qwen2_5_VLConfig(
            text_config={
                **{key: value for key, value in TEXT.items() if key != "head_dim"},
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "patch_size": 2,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [0],
                "window_size": 8,
                "initializer_range": 0.3,
            },
            image_token_id=IMAGE,
            vision_start_token_id=SMALL - 2,
            vision_end_token_id=SMALL - 3,
            video_token_id=SMALL - 4,
        )
        patches = torch.randn(16, 3 * 2 * 2 * 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        inputs, places = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}, 4
    elif name == "mllama":  # which looks at the image in layers of their own
        options = {"rope_parameters": ROPES["default"], "num_hidden_layers": 3, "cross_attention_layers": [1]}
        config = MllamaConfig(
            text_config={
                **{key: value for key, value in TEXT.items() if not key.startswith(("head", "bos", "eos"))},
                **options,
            },
            vision_config={
                **{key: VISION[key] for key in ("hidden_size", "intermediate_size", "image_size", "patch_size")},
                "num_hidden_layers": 1,
                "num_global_layers": 1,
                "attention_heads": 2,
                "vision_output_dim": 32,
                "max_num_tiles": 2,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            },
            image_token_index=IMAGE,
        )
        tiles = pixels[:, None, None].repeat(1, 1, 2, 1, 1, 1)
        # The second tile is padding, and the tokens before the image do not see it.
        seen = torch.zeros(1, 11, 1, 2, dtype=torch.long)
        seen[:, 4:, :, 0] = 1
        inputs = {
            "pixel_values": tiles,
            "aspect_ratio_ids": torch.tensor([[1]]),
            "aspect_ratio_mask": torch.tensor([[[1, 0]]]),
            "cross_attention_mask": seen,
        }
        places = 1
    else:
        config = SmolVLMConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config={**VISION},
            image_token_id=IMAGE,
            scale_factor=2,
        )
        inputs, places = {"pixel_values": pixels[:, None]}, 1
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for layer in model.modules():  # so that the likeliest token depends on the text, and on the image
            if isinstance(layer, torch.nn.Linear | torch.nn.Embedding):
                layer.weight.normal_(0, 2 * layer.weight.shape[-1] ** -0.5)
        for parameter_name, parameter in model.named_parameters():
            if "projection" in parameter_name and parameter.dim() == 2:  # zeros, in a random Gemma 3
                parameter.normal_()
            if parameter_name.endswith("_gate"):  # closed, in a random Mllama
                parameter.fill_(1.0)
    before, after = text(4) % (SMALL - 5) + 1, text(6) % (SMALL - 5) + 1
    image = torch.full((1, places), IMAGE)
    if name == "qwen2_5_vl":
        image = torch.cat([torch.tensor([[SMALL - 2]]), image, torch.tensor([[SMALL - 3]])], dim=1)
    ids = torch.cat([before, image, after], dim=1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in ("gemma3", "qwen2_5_vl"):
        kinds = "token_type_ids" if name == "gemma3" else "mm_token_type_ids"
        inputs[kinds] = (ids == IMAGE).long()
    return model, inputs


IMAGE_MODELS = ["llava", "gemma3", "qwen2_5_vl", "smolvlm", "mllama"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_prompts_with_an_image(name, strategy):
    base, inputs = image_model(name)
    model = upgraded(base, k=3, dtype=torch.float64)
    assert_exact(model, strategy, **inputs)
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert not torch.equal(generate(model, **other), generate(model, **inputs)), "the image is not looked at"


def test_a_batch_of_text_for_a_model_of_images_whose_rows_are_decoded_alone():
    config = CONFIG_MAPPING["qwen3_5"]()
    base = tiny_model(config, model_class=AutoModelForImageTextToText._model_mapping[type(config)])
    ids = text(rows=3) % 30 + 1
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(ids)}
    model = upgraded(base, k=3, dtype=torch.float64).double()
    for options in (inputs, {name: inputs[name] for name in ("input_ids", "attention_mask")}):
        assert_exact(model, "auto", **options)


def test_a_model_that_counts_positions_by_itself():
    base, inputs = image_model("llava")

    class Columns(type(base)):  # as EXAONE 4.5 does
        def prepare_inputs_for_generation(self, *args, **kwargs):
            return {**super().prepare_inputs_for_generation(*args, **kwargs), "position_ids": None}

    base.__class__ = Columns
    model = upgraded(base, k=3, dtype=torch.float64)
    mask = inputs["attention_mask"]
    for hidden in ([], [0, 1], [2]):
        assert_exact(
            model,
            "quadratic",
            **{**inputs, "attention_mask": mask.index_fill(1, torch.tensor(hidden, dtype=torch.long), 0)},
        )


def test_a_model_that_counts_positions_in_a_way_of_its_own():
    base = tiny_base("llama", torch.float64, vocab_size=SMALL)
    llama = type(base)

    class Relative(llama):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            return {**super().prepare_inputs_for_generation(*args, **kwargs), "position_ids": None}

        @functools.wraps(llama.forward)
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
            if position_ids is None and attention_mask is not None:
                position_ids = (attention_mask.cumsum(dim=1) - 1)[:, -input_ids.shape[1] :]
            return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    base.__class__ = Relative
    model, mask = upgraded(base, k=3, dtype=torch.float64), torch.ones(1, PROMPT, dtype=torch.long)
    assert_exact(model, "quadratic", input_ids=text(), attention_mask=mask)
    mask[0, :5] = 0
    with pytest.raises(NotImplementedError, match="Relative drops `position_ids` and counts positions by itself"):
        generate(model, input_ids=text(), attention_mask=mask, mtp=True)


@pytest.mark.parametrize("first_by", [False, True])
@pytest.mark.parametrize("second_by", [False, True])
def test_two_turns_with_a_model_that_counts_positions_by_itself(first_by, second_by):
    class Columns(type(tiny_base("llama"))):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            return {**super().prepare_inputs_for_generation(*args, **kwargs), "position_ids": None}

    base = tiny_base("llama", torch.float64, vocab_size=SMALL)
    base.__class__ = Columns
    model, ids, mask = upgraded(base, k=3, dtype=torch.float64), text(rows=2), torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :5] = 0

    def second_turn(first_by, second_by):
        options = {"return_dict_in_generate": True, "max_new_tokens": 6, "mtp": first_by}
        first = generate(model, input_ids=ids, attention_mask=mask, **options)
        longer = torch.cat([first.sequences, ids[:, :3]], dim=1)
        seen = torch.cat([mask, torch.ones_like(longer[:, PROMPT:])], dim=1)
        return generate(model, input_ids=longer, attention_mask=seen, **{CACHE: first[CACHE]}, mtp=second_by)

    assert torch.equal(second_turn(first_by, second_by), second_turn(False, False))


@pytest.mark.parametrize("cache", [None, "static"])
def test_rows_that_see_the_image_differently(cache):
    base, inputs = image_model("mllama")
    model = upgraded(base, k=3, dtype=torch.float64)
    both = {name: torch.cat([value, value.flip(-1)]) for name, value in inputs.items()}
    both["input_ids"][1] = inputs["input_ids"][0]
    both["attention_mask"][1, :2] = 0
    assert_exact(model, "quadratic", **both, cache_implementation=cache)
    text_only = {name: both[name] for name in ("input_ids", "attention_mask")}
    assert_exact(model, "quadratic", **text_only, cache_implementation=cache)
    assert not torch.equal(generate(model, **text_only), generate(model, **both))


def test_a_cache_with_an_image_is_not_taken_for_tokens():
    base, inputs = image_model("mllama")
    model = upgraded(base, k=3, dtype=torch.float64)
    for mtp in (False, True):
        first = generate(model, **inputs, return_dict_in_generate=True, mtp=mtp)
        with pytest.raises(NotImplementedError, match="contains more than tokens.*Leave out the cache"):
            generate(model, input_ids=torch.cat([first.sequences, text(3)], dim=1), **{CACHE: first[CACHE]}, mtp=True)


def test_what_a_model_is_given_with_every_token():
    """Were it left out, the text would be another one."""
    base, inputs = image_model("llava")

    class Whole(type(base)):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            return {**super().prepare_inputs_for_generation(*args, **kwargs), "shift": torch.tensor([0.0, 9.0])}

        @functools.wraps(type(base).forward)
        def forward(self, *args, shift=None, **kwargs):
            outputs = super().forward(*args, **kwargs)
            if shift is not None:
                outputs.logits[..., ::2] += shift.sum()
            return outputs

    base.__class__ = Whole
    with pytest.raises(NotImplementedError, match="Whole needs shift with every token"):
        generate(upgraded(base, k=3, dtype=torch.float64), **inputs, mtp=True)


def test_layers_that_see_images_only_get_no_lora():
    base, _ = image_model("llava")
    model = upgraded(base, k=3, dtype=torch.float64)
    assert not any("vision" in name for name, _ in model.named_parameters() if "lora_" in name)


def test_a_prompt_that_ends_in_an_image():
    base, inputs = image_model("llava")
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][:, :8], inputs["attention_mask"][:, :8]
    with pytest.raises(NotImplementedError, match="last token of the prompt is not text.*add_generation_prompt=True"):
        generate(upgraded(base, k=3, dtype=torch.float64), **inputs, mtp=True)
