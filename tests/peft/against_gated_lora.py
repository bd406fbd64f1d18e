"""A pytest plugin: in PEFT's tests, `LoraConfig` is `GatedLoraConfig`, and every model of the Hub is a tiny local one.

A failure that `does_not_apply.txt` explains counts as expected; any other failure counts.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import peft
import pytest
import torch
from tiny_hub import VOCAB

from hf_mtp import GatedLoraConfig

peft.LoraConfig = GatedLoraConfig  # before PEFT's tests import it


@dataclass
class Entry:
    """A line of the list: a pattern of test names or, in quotes, a part of an error's message; and the reason.

    Failures are counted: an entry that explains none is out of date.
    """

    key: str
    reason: str
    failures: int = 0

    def explains(self, test: str, errors: list[str]) -> bool:
        if self.key.startswith('"'):
            return any(self.key.strip('"') in error for error in errors)
        return fnmatchcase(test, self.key)


def read_entries() -> list[Entry]:
    lines = Path(__file__).with_name("does_not_apply.txt").read_text(encoding="utf-8").splitlines()
    return [Entry(*line.rsplit(": ", 1)) for line in lines if line and not line.startswith("#")]


ENTRIES = read_entries()


class _All(Counter):
    """Models that PEFT's `hub_online_once` takes for downloaded, so that it goes on without the Hub."""

    def __contains__(self, name: object) -> bool:
        return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is parametrised with other PEFT methods."""
    from tests import testing_utils  # PEFT's

    testing_utils._HUB_MODEL_ACCESSES = _All()
    is_ours = [_method(item) in (None, GatedLoraConfig) for item in items]
    config.hook.pytest_deselected(items=[item for item, ours in zip(items, is_ours, strict=True) if not ours])
    items[:] = [item for item, ours in zip(items, is_ours, strict=True) if ours]


@pytest.fixture(autouse=True)
def _masks_to_learn_from(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives masks to tests of training, because a gated LoRA learns from nothing else.

    They train on logits, in which the sampler head has no part, so there is none.
    """
    if not re.search("training_decoders|inference_safetensors", request.node.name):
        return
    inputs = request.instance.prepare_inputs_for_testing()
    mask_ids = torch.arange(VOCAB, VOCAB + GatedLoraConfig.k).expand(len(inputs["input_ids"]), -1)
    inputs = {
        "input_ids": torch.cat([inputs["input_ids"], mask_ids], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(mask_ids)], dim=1),
    }
    monkeypatch.setattr(request.instance, "prepare_inputs_for_testing", lambda: inputs)
    monkeypatch.setitem(request.getfixturevalue("config_kwargs"), "sampler", False)


def _method(item: pytest.Item) -> type | None:
    """The config class that a test gets as a parameter, if any."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("config_cls", parameters.get("config_class"))


def _errors(error: BaseException | None) -> Iterator[str]:
    """Messages of an exception and of those that led to it."""
    while error is not None:
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__ or error.__context__


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed:
        test, errors = item.nodeid.removeprefix("tests/"), list(_errors(call.excinfo.value))
        for entry in ENTRIES:
            if entry.explains(test, errors):
                entry.failures += 1
                report.outcome, report.wasxfail = "skipped", entry.reason
                break
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    all_ran = not terminalreporter.config.getoption("keyword")
    for entry in ENTRIES:
        if all_ran and not entry.failures:
            terminalreporter.write_line(f"does_not_apply.txt: nothing fails any more by {entry.key}: take it out.")
