"""Packaging of hf_mtp. Settings of tools are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# The one place that holds the version: hf_mtp.__version__ reads it back through importlib.metadata.
VERSION = "0.1.0"

PLOTS = ["matplotlib>=3.9"]  # training_curves.png; left out without
# What the server parts of transformers need, and Prometheus' client.
SERVE = ["fastapi>=0.115", "openai>=1.98", "prometheus-client>=0.21", "uvicorn>=0.30"]
GREENLET = "greenlet>=3.2"
DEMO = ["gradio>=6.10", GREENLET]
QUICKSTART = [*PLOTS, "gguf>=0.17", "rich>=13.9"]  # gguf: SmolLM2 comes as a GGUF file
RUFF = "ruff==0.17.6"
TEST = [*QUICKSTART, *SERVE, GREENLET, "pytest>=8.4", "pytest-xdist>=3.6", RUFF]  # quickstart and races are tested too
# What PEFT's own tests import. Its package imports attr, too, but does not require attrs.
TEST_PEFT = [*TEST, "attrs", "diffusers>=0.38", "parameterized>=0.9", "scipy>=1.14"]
QUANTIZATION = ["bitsandbytes>=0.50", "optimum-quanto>=0.2.7", "torchao>=0.18"]  # their tests are skipped without
EVAL = ["lm_eval>=0.4.13"]  # tests of the harness are skipped without
DISTRIBUTED = ["deepspeed>=0.19"]  # DDP and FSDP need nothing more
DOCS = ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0", RUFF]  # the documentation site

readme = Path(__file__).with_name("README.md")

setup(
    name="hf_mtp",
    version=VERSION,
    description="Any causal language model of the Hub generates several tokens per forward pass, same output.",
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
    long_description_content_type="text/markdown",
    author="The hf_mtp contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="multi-token prediction, speculative decoding, LoRA, PEFT, transformers, TRL",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["hf_mtp", "hf_mtp.*"]),
    # Folders of metrics are no packages: they have the layout that the `evaluate` library loads.
    package_data={
        "hf_mtp": ["py.typed", "evaluation/suites/data/*.jsonl", "evaluation/metrics/*/*", "demo/style.css"]
    },
    # Floors only. The last releases of transformers and trl for Python 3.10 are 5.20 and 1.14.
    install_requires=[
        "torch>=2.4",
        "transformers>=5.20",
        "peft>=0.21.2",
        "trl>=1.14",
        "accelerate>=1.10.1",
        "datasets>=4.7",
        "evaluate>=0.4.6",
        "huggingface_hub>=1.31",
        "safetensors>=0.8",
        "typer>=0.15",
    ],
    entry_points={"console_scripts": ["hf-mtp=hf_mtp.cli.main:main", "hf-mtp-regenerate=hf_mtp.cli.regenerate:main"]},
    extras_require={
        "test": TEST,
        "test-peft": TEST_PEFT,
        "quickstart": QUICKSTART,
        "serve": SERVE,
        "demo": DEMO,
        "plots": PLOTS,
        "quantization": QUANTIZATION,
        "distributed": DISTRIBUTED,
        "eval": EVAL,
        "docs": DOCS,
    },
)
