"""Loading by Hub id or folder."""

import pytest
from tiny_models import upgraded
from transformers import AutoTokenizer

from hf_mtp.pretrained import load_model, load_processor, load_tokenizer


@pytest.mark.parametrize("load", [load_tokenizer, load_processor, "loaded"])
def test_the_tokenizer_is_that_of_the_revision_of_the_base(load, tmp_path, monkeypatch):
    model, calls = upgraded("llama"), []
    model.get_base_model().save_pretrained(tmp_path / "base")
    model.active_peft_config.base_model_name_or_path = str(tmp_path / "base")
    model.active_peft_config.revision = "trial"
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **hub: calls.append(hub))
    hub = {"token": "hf_x", "revision": "of-the-adapter"}
    if load == "loaded":
        load_tokenizer("", model, **hub)
    else:
        load(str(tmp_path / "adapter"), **hub)
    assert calls == [{"token": "hf_x", "revision": "trial"}]


def test_a_folder_of_checkpoints_is_refused_with_the_newest(tmp_path):
    model = upgraded("llama")
    model.get_base_model().save_pretrained(tmp_path / "base")
    model.active_peft_config.base_model_name_or_path = str(tmp_path / "base")
    for step in (9, 10):
        model.save_pretrained(tmp_path / "out" / f"checkpoint-{step}")
    with pytest.raises(OSError, match=r"only checkpoints of a training\. Pass one of them, such as .*checkpoint-10, "):
        load_model(str(tmp_path / "out"))
    load_model(str(tmp_path / "out" / "checkpoint-10"))
    model.get_base_model().save_pretrained(tmp_path / "out")  # as a training of all weights leaves it
    load_model(str(tmp_path / "out"))
