"""The speculation mode of a model is found out by a trial; decoding and training go by it."""

import inspect
import logging

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from layouts import masked_states
from tiny_models import CACHE, adapter_parameters, tiny_base, upgraded
from transformers import CONFIG_MAPPING, DynamicCache
from transformers.utils import logging as host_logging

from hf_mtp.base.caches import cache_name
from hf_mtp.base.sizes import VOCAB
from hf_mtp.base.tiny import tiny_model
from hf_mtp.evaluation.support import Rehearsal
from hf_mtp.layout.blocks import segments, training_layout
from hf_mtp.objective.request import ObjectiveRequest
from hf_mtp.passes.speculation_mode import SpeculationMode, speculation_mode

MODES = {
    "llama": SpeculationMode.TREE,
    "bloom": SpeculationMode.CHAIN,  # alibi: distance counts in columns, which a branch skips
    "mamba2": SpeculationMode.CHAIN_ON_COPY,
    "qwen3_next": SpeculationMode.CHAIN_ON_COPY,
    "rwkv": SpeculationMode.CHAIN_ON_COPY,
    "mamba": SpeculationMode.RECOMPUTE,
    "jamba": SpeculationMode.RECOMPUTE,
}
SEQUENTIAL = [name for name, mode in MODES.items() if mode is not SpeculationMode.TREE]
OF_EACH_KIND = ["bloom", "mamba2", "mamba"]


def model_of(name: str, dtype: torch.dtype = torch.float64):
    return upgraded(tiny_model(CONFIG_MAPPING[name]()).to(dtype), k=3)


def ids(length: int = 11, rows: int = 1, seed: int = 0) -> torch.LongTensor:
    return torch.randint(1, VOCAB - 1, (rows, length), generator=torch.Generator().manual_seed(seed))


def generate(model, input_ids, new_tokens: int = 20, **arguments):
    return model.generate(
        input_ids=input_ids,
        **{"attention_mask": torch.ones_like(input_ids), **arguments},
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )


def rehearse(model, *sequences: torch.LongTensor) -> None:
    """Makes drafts right, wrong and missing in turns."""
    model.base_model.draft = Rehearsal(list(sequences))


@pytest.mark.parametrize("name", MODES)
def test_mode(name):
    assert speculation_mode(model_of(name).get_base_model()) is MODES[name]


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_linear_decoding_is_exact(name):
    model = model_of(name)
    expected = generate(model, ids())
    rehearse(model, expected)
    assert torch.equal(generate(model, ids(), mtp=True, mtp_strategy="linear"), expected)
    statistics = model.base_model.mtp_statistics
    assert 0 < statistics.accepted < statistics.drafted
    assert statistics.tokens == 20 and len(statistics.steps) < 20


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_auto_is_exact_and_says_why(name, caplog, monkeypatch):
    model = model_of(name)
    expected = generate(model, ids())
    monkeypatch.setattr(host_logging.get_logger("hf_mtp"), "propagate", True)
    host_logging.set_verbosity_info()
    host_logging.get_logger("hf_mtp.decoding.generate").warning_once.cache_clear()
    with caplog.at_level(logging.INFO, "hf_mtp.decoding.generate"):
        assert torch.equal(generate(model, ids(), mtp=True), expected)
    host_logging.set_verbosity_warning()
    if MODES[name] is SpeculationMode.RECOMPUTE:
        assert "uses plain decoding, which is faster" in caplog.text
    else:
        assert (
            f"'linear': {type(model.get_base_model()).__name__} allows the mode {MODES[name].value!r}" in caplog.text
        )


@pytest.mark.parametrize("strategy", ["linear", "auto"])
@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_rows_of_a_batch_are_what_they_are_alone(name, strategy):
    model = model_of(name)
    prompts = [ids(11), ids(6, seed=1), ids(9, seed=2)]
    alone = [generate(model, prompt) for prompt in prompts]
    rehearse(model, *alone)
    batch = torch.cat([torch.nn.functional.pad(prompt, (11 - prompt.shape[1], 0)) for prompt in prompts])
    output = generate(model, batch, attention_mask=(batch != 0).long(), mtp=True, mtp_strategy=strategy)
    for row, prompt in enumerate(prompts):
        assert torch.equal(output[row, 11:], alone[row][0, prompt.shape[1] :])


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_sampling_is_repeatable_and_draws_what_the_base_allows(name):
    model = model_of(name)
    outputs = [
        model.generate(
            input_ids=ids(),
            max_new_tokens=12,
            do_sample=True,
            top_k=2,
            eos_token_id=None,
            pad_token_id=0,
            mtp=True,
            mtp_strategy="linear",
            generator=torch.Generator().manual_seed(5),
        )
        for _ in range(2)
    ]
    assert torch.equal(*outputs)
    logits_TV = model(outputs[0]).logits[0, 10:-1]
    best_T2 = logits_TV.topk(2, dim=-1).indices
    assert (best_T2 == outputs[0][0, 11:, None]).any(dim=-1).all()


@pytest.mark.parametrize("name", ["bloom", "qwen3_next"])
def test_a_second_turn_goes_on_from_the_first_turns_cache(name):
    model = model_of(name)
    first = generate(model, ids(), return_dict_in_generate=True, mtp=True, mtp_strategy="linear")
    longer = torch.cat([first.sequences, ids(4, seed=3)], dim=1)
    expected = generate(model, longer)
    assert torch.equal(generate(model, longer, **{CACHE: first[CACHE]}, mtp=True, mtp_strategy="linear"), expected)


def test_a_state_alone_does_not_say_what_it_has_read():
    model = model_of("mamba2")
    first = generate(model, ids(), return_dict_in_generate=True, mtp=True)
    name = cache_name(inspect.signature(model.get_base_model().forward).parameters)
    with pytest.raises(NotImplementedError, match="whose number of tokens is unknown"):
        generate(model, first.sequences, **{name: first[CACHE]}, mtp=True)


def test_whole_texts_are_not_read_behind_a_cache():
    model = model_of("jamba")
    first = generate(model, ids(), return_dict_in_generate=True)
    with pytest.raises(NotImplementedError, match="a cache that is not empty.*Pass none"):
        generate(model, first.sequences, **{CACHE: first[CACHE]}, mtp=True, mtp_strategy="linear")


def test_what_plain_sequences_do_not_allow():
    model = model_of("bloom")
    with pytest.raises(NotImplementedError, match="a static cache.*Leave `cache_implementation` out"):
        generate(model, ids(), mtp=True, cache_implementation="static")
    with pytest.raises(NotImplementedError, match="a batch that continues from a cache"):
        cache = DynamicCache()
        both = ids(rows=2)
        generate(model, both[:, :6], 1, **{CACHE: cache})
        generate(model, both, **{CACHE: cache}, mtp=True)


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_masks_of_a_training_batch_are_read_behind_their_anchors(name):
    model, input_ids = model_of(name), ids(9, rows=2)
    tuner = model.base_model
    positions = torch.arange(9).expand(2, 9)
    layout = training_layout(input_ids, positions, segments(None, positions), k=3, same_in_all_rows=True)
    regular, masks = masked_states(tuner, input_ids, layout)
    plain = tuner.model.get_decoder()(input_ids).last_hidden_state
    torch.testing.assert_close(regular[-1], plain)
    anchor, index = 4, torch.arange(3).expand(2, 3)
    with tuner.masks_in_columns(anchor + 1, index):
        text = torch.cat([input_ids[:, : anchor + 1], index + tuner.vocab_size], dim=1)
        expected = tuner.model.get_decoder()(text).last_hidden_state[:, anchor + 1 :]
    column = layout.anchor_BM[0].tolist().index(anchor)
    torch.testing.assert_close(masks[-1][:, column : column + 3], expected)


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_training_reaches_every_adapter_parameter_and_learns(name):
    model = model_of(name, torch.float32).train()
    input_ids = ids(9, rows=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        objective = model(input_ids=input_ids, mtp_objective=ObjectiveRequest())
        optimizer.zero_grad()
        objective.loss.backward()
        optimizer.step()
        losses.append(float(objective.loss))
    assert losses[-1] < 0.9 * losses[0]
    # mamba reads the weight of this layer without calling it, so that nothing could act on it.
    missing = [name for name, parameter in adapter_parameters(model).items() if parameter.grad is None]
    assert all("dt_proj" in name for name in missing)


def test_packed_texts_are_refused():
    model = model_of("mamba2")
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    with pytest.raises(ValueError, match="one sequence per row.*packing=False"):
        model(input_ids=ids(10), position_ids=positions, mtp_objective=ObjectiveRequest())


@pytest.mark.parametrize("by", ["config", "generation_config"])
def test_a_model_that_uses_no_cache_by_default(by):
    model = model_of("mpt" if by == "config" else "bloom")
    model.generation_config.use_cache = False
    plain = generate(model, ids())
    rehearse(model, plain)
    assert torch.equal(generate(model, ids(), mtp=True, mtp_strategy="linear"), plain)
    assert model.base_model.mtp_statistics.accepted
    with pytest.raises(ValueError, match="`mtp=True` needs a cache.*`use_cache=False`. Leave it out"):
        generate(model, ids(), mtp=True, use_cache=False)


# ---------------------------------------------------------------- what passes, and what does not


def fails(times: int, error: Exception):
    """A hook that raises an error so often."""
    calls = iter(range(times))

    def hook(module, args):
        if next(calls, None) is not None:
            raise error

    return hook


def first_layer(model) -> torch.nn.Module:
    return next(module for name, module in model.get_base_model().named_modules() if name.endswith("layers.0"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("simulated"), RuntimeError("a kernel is busy")])
@pytest.mark.parametrize("times", [1, 2, 3, 6])
def test_an_error_of_the_moment_is_not_kept(times, error, caplog, monkeypatch):
    monkeypatch.setattr(host_logging.get_logger("hf_mtp"), "propagate", True)
    model = upgraded("llama", k=3)
    plain = generate(model, ids())
    hook = first_layer(model).register_forward_pre_hook(fails(times, error))
    mode = speculation_mode(model.get_base_model())
    assert mode is not SpeculationMode.TREE
    assert f"This call uses mode {mode.value!r}, and the next call tries again" in caplog.text
    hook.remove()
    assert speculation_mode(model.get_base_model()) is SpeculationMode.TREE
    assert torch.equal(generate(model, ids(), mtp=True, mtp_strategy="quadratic"), plain)
    assert model.base_model.mtp_statistics.drafted


def test_logits_that_are_nan_are_named_and_not_blamed_on_the_cache(caplog, monkeypatch):
    monkeypatch.setattr(host_logging.get_logger("hf_mtp"), "propagate", True)
    model = upgraded("llama", k=3)
    hook = first_layer(model).register_forward_hook(lambda module, args, states: states * torch.nan)
    assert speculation_mode(model.get_base_model()) is SpeculationMode.NONE
    assert "its logits are NaN in torch.float32" in caplog.text
    hook.remove()
    assert speculation_mode(model.get_base_model()) is SpeculationMode.TREE


def test_a_call_with_an_error_of_the_moment_is_exact():
    model = upgraded("llama", k=3)
    plain = generate(model, ids())
    first_layer(model).register_forward_pre_hook(fails(2, torch.OutOfMemoryError("simulated")))
    for _ in range(2):
        assert torch.equal(generate(model, ids(), mtp=True), plain)
    assert model.base_model.mtp_statistics.tokens == 20


def test_an_error_in_every_model_of_the_kind_is_kept():
    model = model_of("bloom")  # which takes no branch, whatever its size
    calls = []
    assert speculation_mode(model.get_base_model()) is SpeculationMode.CHAIN
    model.get_base_model().register_forward_pre_hook(lambda *args: calls.append(1))
    assert speculation_mode(model.get_base_model()) is SpeculationMode.CHAIN
    assert not calls


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_autocast_changes_nothing_that_is_found_out(name):
    model = model_of(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        generate(model, ids(), 4, mtp=True)
    assert speculation_mode(model.get_base_model()) is MODES[name]


@pytest.fixture
def new_accelerator():
    """accelerate keeps the precision of a process's first accelerator, whichever test made it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", ["llama", *OF_EACH_KIND])
def test_autocast_within_the_forward_pass_changes_nothing_either(name, new_accelerator):
    base = model_of(name, torch.float32).get_base_model()
    wrapped = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(base)
    assert wrapped is base and "forward" in vars(base)
    assert speculation_mode(base) is MODES.get(name, SpeculationMode.TREE)


@pytest.mark.parametrize("training", [False, True])
def test_a_model_in_training_mode_stays_so(training):
    model = upgraded(tiny_model(CONFIG_MAPPING["gpt2"](resid_pdrop=0.5)), k=3).train(training)
    assert speculation_mode(model.get_base_model()) is SpeculationMode.TREE
    assert model.training == training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "bloom", "mamba2"])
def test_half_precision_is_told_from_what_is_wrong(name, dtype):
    assert speculation_mode(model_of(name, dtype).get_base_model()) is MODES[name]


def test_each_attention_implementation_has_its_own_answer():
    model = upgraded("llama", k=3)
    assert speculation_mode(model.get_base_model()) is SpeculationMode.TREE
    model.get_base_model().set_attn_implementation("eager")
    hook = first_layer(model).register_forward_pre_hook(fails(99, RuntimeError("no such kernel")))
    assert speculation_mode(model.get_base_model()) is not SpeculationMode.TREE
    model.get_base_model().set_attn_implementation("sdpa")
    assert speculation_mode(model.get_base_model()) is SpeculationMode.TREE
    hook.remove()


def test_the_adapter_has_no_say():
    """Neither broken weights nor disabled ones change what the base allows."""
    model = upgraded("llama", k=3)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.fill_(torch.nan)
    assert speculation_mode(model.get_base_model()) is SpeculationMode.TREE


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}], ids=["together", "in_order"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("strategy", ["quadratic", "linear", "auto"])
def test_an_adapter_that_is_not_finite_raises(strategy, value, options):
    model = upgraded("llama", k=3)
    plain = generate(model, ids(), **options)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "lora_B" in name:
                parameter.fill_(value)
    with pytest.raises(FloatingPointError, match="hidden states that are NaN or infinite.*float32.*mtp=False"):
        generate(model, ids(), mtp=True, mtp_strategy=strategy, **options)
    assert torch.equal(generate(model, ids(), **options), plain)


def test_an_adapter_too_large_for_half_precision_raises():
    model = upgraded("llama", k=3, dtype=torch.float16)
    plain = generate(model, ids())
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "lora_B" in name:
                parameter.fill_(6e4)
    with pytest.raises(FloatingPointError, match="too large for this dtype"):
        generate(model, ids(), mtp=True, mtp_strategy="quadratic")
    assert torch.equal(generate(model, ids()), plain)


def test_a_vocabulary_of_two_tokens():
    assert speculation_mode(upgraded(tiny_base("llama", vocab_size=2), k=3).get_base_model()) is SpeculationMode.TREE
