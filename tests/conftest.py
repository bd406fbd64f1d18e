"""Every test runs offline, on one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # if OpenMP used more, a forked process would wait for them for ever
os.environ.pop("CUDA_VISIBLE_DEVICES", None)

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_verbosity():
    """The command quiets the host libraries, in a process that is its own. Here later tests need their warnings."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if has_bars else logging.disable_progress_bar)()


@pytest.fixture(scope="module")
def server(adapter):
    """A running server of the `adapter` of a test module."""
    from tiny_server import served  # here, because most modules need no server

    with served(adapter) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    """A client of the server."""
    import openai

    return openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)
