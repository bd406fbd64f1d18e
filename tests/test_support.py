"""A slice of the support matrix, chosen to differ: types decode as docs/results/support.json says, and exactly."""

import json
from pathlib import Path

import pytest
import transformers
from transformers import CONFIG_MAPPING

from hf_mtp import check_support

MATRIX = json.loads((Path(__file__).parents[1] / "docs" / "results" / "support.json").read_text(encoding="utf-8"))
ROWS = {(row["model_type"], row["variant"]): row for row in MATRIX["rows"]}
# Results may differ between minor releases; that decoding is exact may not.
IS_SAME_RELEASE = (
    transformers.__version__.split(".")[:2] == MATRIX["machine"]["versions"]["transformers"].split(".")[:2]
)
SLICE = [
    "llama",  # the usual case
    "mistral",  # a sliding window in all layers
    "gemma2",  # in some
    "gemma3n_text",  # keys and values shared by layers, an embedding per layer
    "gemma4_text",  # widths that differ by layer
    "gpt2",  # learned absolute positions, Conv1D
    "opt",  # an offset to them
    "gpt_neox",  # attention and MLP side by side
    "gptj",
    "bigcode",
    "gpt_bigcode",  # one key and value head
    "gpt_neo",  # a window that counts columns
    "codegen",
    "falcon",
    "cohere2",
    "mixtral",  # a mixture of experts
    "llama4_text",  # chunks, and a router that returns two tensors
    "gpt_oss",  # attention sinks
    "deepseek_v3",  # latent keys and values
    "glm4_moe",
    "modernbert-decoder",  # a head of its own before the unembedding
    "phimoe",
    "bloom",  # alibi
    "mpt",
    "bart",  # the decoder of an encoder-decoder
    "mamba",  # a state only
    "mamba2",
    "rwkv",
    "jamba",  # states and attention
    "zamba2",
    "qwen3_next",
    "recurrent_gemma",
    "bert",  # refused: an encoder
    "xlnet",
]


def without_reasons(checks: dict[str, str]) -> dict[str, str]:
    return {name: result.partition(":")[0] for name, result in checks.items()}


@pytest.mark.parametrize("model_type", [name for name in SLICE if name in CONFIG_MAPPING])
def test_a_type_is_as_the_matrix_says(model_type):
    report = check_support(CONFIG_MAPPING[model_type]())
    assert report.is_exact, str(report)
    if IS_SAME_RELEASE:
        row = ROWS[model_type, ""]
        assert (report.mode, report.strategy) == (row["mode"], row["strategy"])
        assert without_reasons(report.checks) == without_reasons(row["checks"])


# RoBERTa counts its positions from the padding token's id, so positions from 0 give another text.
@pytest.mark.parametrize(
    "model_type, strategy",
    [("bert", "quadratic"), ("roberta", "linear"), ("electra", "quadratic"), ("rembert", "quadratic")],
)
def test_encoders_as_decoders(model_type, strategy):
    report = check_support(CONFIG_MAPPING[model_type](is_decoder=True))
    assert (report.strategy, report.checks["auto"], report.is_exact) == (strategy, "exact", True), str(report)


def test_the_matrix_has_no_mismatch_and_enough_types():
    types = [row for row in MATRIX["rows"] if not row["variant"]]
    assert all(row["is_exact"] for row in MATRIX["rows"])
    assert sum(row["strategy"] == "quadratic" for row in types) >= 105
    assert sum(row["strategy"] in ("quadratic", "linear") for row in types) >= 120


def test_a_model_that_is_given():
    from tiny_models import tiny_base, upgraded

    assert check_support(tiny_base("llama")).strategy == "quadratic"
    report = check_support(upgraded("llama"))
    assert str(report).startswith("llama: quadratic (mode: tree)\n  quadratic: exact\n  linear: exact")


def test_a_folder(tmp_path):
    CONFIG_MAPPING["qwen2"]().save_pretrained(tmp_path)
    assert check_support(str(tmp_path)).strategy == "quadratic"


@pytest.mark.parametrize("given", [None, 3, CONFIG_MAPPING])
def test_what_is_no_model(given):
    with pytest.raises(TypeError, match="Expected a transformers model, its config, or its Hub id or folder"):
        check_support(given)


def test_configs_of_no_language_model():
    report = check_support(CONFIG_MAPPING["vit"]())
    assert report.strategy is None and "ViTConfig" in report.reason
