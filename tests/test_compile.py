"""`cache_implementation="static"` runs one compiled graph: no breaks, and nothing is compiled again after warm-up."""

import pytest
import torch
from test_generation import small_model, small_prompt
from tiny_models import generate
from transformers import CompileConfig

COMPILED = []


def counting(graph, example_inputs):
    """A backend that runs graphs as they are, and keeps them."""
    COMPILED.append(graph)
    return graph


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    COMPILED.clear()
    yield COMPILED
    torch._dynamo.reset()


@pytest.mark.parametrize("strategy", ["quadratic", "linear", "auto"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_one_graph(architecture, strategy, graphs):
    model = small_model(architecture)
    compiled = {
        "cache_implementation": "static",
        "compile_config": CompileConfig(fullgraph=True, dynamic=False, backend=counting, mode=None),
        "mtp": True,
        "mtp_strategy": strategy,
    }
    for call in range(3):
        prompt = small_prompt(11 + call)  # of another length, and yet nothing is compiled again
        output = generate(model, prompt, 30, **compiled)
        assert torch.equal(output, generate(model, prompt, 30))
        if call == 0:  # passes with masks and, where decoding chooses, plain ones
            warm = len(graphs)
            assert 1 <= warm <= (2 if strategy == "auto" else 1)
        assert len(graphs) <= (2 if strategy == "auto" else 1)


def test_without_compile_config_a_cpu_runs_the_same_shapes_uncompiled(graphs):
    model = small_model()
    output = generate(model, small_prompt(), 30, cache_implementation="static", mtp=True)
    assert torch.equal(output, generate(model, small_prompt(), 30))
    assert len(graphs) == 0
