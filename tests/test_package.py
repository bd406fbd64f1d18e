"""The package as a house: imports run downwards, importing is cheap, and every public name is documented."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from transformers import TrainingArguments
from trl import SFTConfig

import hf_mtp
from hf_mtp.decoding.generate import GenerationMixin

PACKAGE = Path(hf_mtp.__file__).parent

# Rooms and what is in them, both from the bottom up: a module imports from those before it only.
ORDER = """
layout: tree mask_plan blocks attention
base: files padding threads autocast token_text caches inspection head rope randomness sizes tiny distributed embedding
base: lora_layers machine plotting
cache: column_attention shared_heads rows rollback sequence protocol
adapter: access peft_type ngram_table loading config base_identity custom_generate card
adapter: prepared gate parameters stacked hub sampler names noise_tokens mask_input tuner
passes: summation_order bitwise decoding_pass recurrent_pass speculation_mode bitwise_check
passes: training_checks training_pass
data: rows prompts randomness shard survey answers responses ngram_counts ngrams
objective: losses recipe request simulation chunked_backward compute
decoding: noise noise_processor sequence states outcome
decoding.drafters: base acceptance lookup ngrams table masks
decoding.schedule: base costs candidates columns fixed adaptive store
decoding: statistics processors batch verification verifier loop prefill prompt checks devices streaming call generate
: model registration pretrained attached
export: files fit plain_lora vllm uno
serving: text rules request metrics serial engine limits messages choices response_events fields
serving: manager handlers middleware port server
serving.vllm: adapter arguments schedule drafter scheduler runner guard worker
serving: vllm_server
evaluation: measures decoded support compare markdown documents methods
evaluation.metrics.tokens_per_pass: tokens_per_pass app
evaluation.metrics.acceptance_per_position: acceptance_per_position app
evaluation.metrics.agreement: agreement app
evaluation.suites: benchmarks rows suite prompts
evaluation: run
evaluation.exactness: divergence two_sample verify
evaluation.speed: results folder simulated runner tables curves report
evaluation.ranks: placeholders results probe figures report
evaluation: harness
training.recovery: nonfinite compatibility checkpoint workers
training: batches evaluation precision config optimizer data_checks
training.callbacks: deadline interrupt decoding progress curves attach
training: trainer
demo: turns settings plain_sampling lane race drawing page app
cli: verb lists documents strategy session generate chat demo serve
cli: train regenerate ngrams check push export verify evaluate probe app main
: regenerate
"""
MODULES = [
    f"{room}.{name}".lstrip(".")
    for room, _, names in (line.partition(": ") for line in ORDER.strip().splitlines())
    for name in names.split()
]

# Functions of tensors and rows: they know nothing of models, configs or each other's callers.
PURE = {
    *(f"layout.{name}" for name in ("tree", "mask_plan", "blocks", "attention")),
    *(f"objective.{name}" for name in ("losses", "simulation")),
    "adapter.noise_tokens",
    "adapter.sampler",
    "base.autocast",
    "decoding.noise",
}


def path_of(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def imports_of(module: str) -> set[str]:
    """Modules of the package that a module imports, also for type checkers or inside of a function."""
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    rooms = module.split(".")[:-1]
    return {
        ".".join([*rooms[: len(rooms) + 1 - node.level], node.module])
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level and node.module
    }


def test_every_module_has_its_place():
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py") if path.stem != "__init__")
    assert sorted(MODULES) == sorted(".".join(path.parts) for path in paths)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module):
    assert imports_of(module) <= set(MODULES[: MODULES.index(module)])


@pytest.mark.parametrize("module", sorted(PURE))
def test_tensor_functions_know_no_models(module):
    assert imports_of(module) <= PURE


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module):
    assert ast.get_docstring(ast.parse(path_of(module).read_text(encoding="utf-8")))


IMPORTS = """
import sys, peft
packages = lambda: {name.partition(".")[0] for name in sys.modules}
before = packages()
import hf_mtp
extra = packages() - before
hf_mtp.MTPTrainer
print(*sorted(extra), "then", *({"trl"} & packages()))
"""


def test_importing_adds_little_to_peft_and_the_trainer_loads_when_first_used():
    result = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    extra, _, later = result.stdout.strip().partition(" then ")
    assert set(extra.split()) - set(sys.stdlib_module_names) == {"hf_mtp"}
    assert later == "trl"


def test_version():
    assert re.match(r"\d+(\.\d+)*", hf_mtp.__version__)
    try:
        assert hf_mtp.__version__ == version("hf_mtp")
    except PackageNotFoundError:
        assert hf_mtp.__version__ == "0+unknown"


# ---------------------------------------------------------------- documentation

PUBLIC = {name: getattr(hf_mtp, name) for name in hf_mtp.__all__}
CLASSES = [value for value in PUBLIC.values() if inspect.isclass(value)]


def test_public_names():
    assert set(PUBLIC) == {
        "DecodingCallback",
        "GatedLoraConfig",
        "GatedLoraModel",
        "MTPConfig",
        "MTPGenerateOutput",
        "MTPStatistics",
        "MTPTrainer",
        "NgramTable",
        "SupportReport",
        "check_support",
        "count_ngrams",
        "regenerate_responses",
    }
    with pytest.raises(AttributeError, match="'hf_mtp' has no attribute 'MTPTrainr'"):
        hf_mtp.MTPTrainr  # noqa: B018


def documented(text: str) -> set[str]:
    """Names before the colon of an entry such as "base_weight, lcm_weight (`float`, *optional*): ..."."""
    while text != (shorter := re.sub(r" ?\([^()]*\)", "", text)):
        text = shorter
    entries = re.findall(r"^\s*(\w+(?:, \w+)*):", text, flags=re.MULTILINE)
    return {name for entry in entries for name in entry.split(", ")}


@pytest.mark.parametrize("name", PUBLIC)
def test_fields_and_arguments_are_documented(name):
    cls = PUBLIC[name]
    text = inspect.getdoc(cls)
    inherited = (
        {field.name for field in dataclasses.fields(SFTConfig)}
        if cls in CLASSES and issubclass(cls, SFTConfig)
        else set()
    )
    if dataclasses.is_dataclass(cls):
        own = set(vars(cls)["__annotations__"]) - inherited
    else:
        own = set(inspect.signature(cls).parameters) - {"args", "kwargs", "train_dataset"}
    own -= {"low_cpu_mem_usage", "state_dict"}  # of a tuner, and PEFT's own business
    assert own <= documented(text)


@pytest.mark.parametrize(
    "method",
    [
        member
        for cls in (*CLASSES, GenerationMixin)
        for member in vars(cls).values()
        if inspect.isfunction(member)
        and not member.__name__.startswith("_")
        and member.__module__.startswith("hf_mtp")
    ],
    ids=lambda method: method.__qualname__,
)
def test_methods_are_documented(method):
    own_words = method.__doc__
    inherited = method.__name__ in dir(SFTConfig) or any(
        method.__name__ in vars(parent)
        for cls in CLASSES
        for parent in cls.__mro__
        if not parent.__module__.startswith("hf_mtp")
    )
    assert own_words or inherited


def test_config_fields_have_help():
    for config, inherited in ((hf_mtp.MTPConfig, SFTConfig), (hf_mtp.GatedLoraConfig, None)):
        own = config.__dict__["__annotations__"]
        for field in dataclasses.fields(config):
            if field.name in own:
                assert field.metadata["help"]
        assert inherited is None or issubclass(config, TrainingArguments)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_public_functions_are_documented(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            text = ast.get_docstring(node)
            assert text, f"{path.name}: {node.name}"
            if isinstance(node, ast.FunctionDef):
                arguments = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
                if "Args:" in text:
                    assert arguments <= documented(text), f"{path.name}: {node.name}"
