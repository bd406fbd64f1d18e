"""What two people do with a Hub, each in a process and with a cache of their own. Run by test_hub.py.

Each ends by printing one JSON document: what they saw.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from hub_stand_in import TOKEN

TESTS = Path(__file__).parent


def run_session(script: str, *arguments: str, hub, home: Path, **environment: str) -> dict:
    """Runs a script of this folder in a process whose Hub is the stand-in."""
    result = subprocess.run(
        [sys.executable, TESTS / script, *arguments],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "*",
            "PYTHONPATH": str(TESTS.parent),
            **environment,
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def saved_base(folder: Path, **overrides) -> Path:
    """A tiny Llama and its tokenizer in a folder."""
    from tiny_models import tiny_base
    from tiny_text import tiny_tokenizer

    tiny_base(**overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def only_loopback() -> None:
    """Lets no connection out of this machine."""
    connect = socket.socket.connect

    def checked(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"A test reached outside: {address}")
        return connect(self, address)

    socket.socket.connect = checked


def author() -> dict:
    """Upgrades `me/base` and shares three adapters of it."""
    from tiny_models import randomised
    from transformers import AutoModelForCausalLM

    from hf_mtp.data.ngram_counts import count_tokens

    base = AutoModelForCausalLM.from_pretrained("me/base")
    model = randomised(upgrade(base)).eval()
    model.push_to_hub("me/my-model-mtp", tags=["tiny"])
    model.push_to_hub("me/by-hand")
    model.push_to_hub("me/on-a-branch", revision="trial", commit_message="A trial")
    model.active_peft_config.ngrams = count_tokens([[7, 8, 9]] * 2)
    model.push_to_hub("me/with-ngrams", revision="trial")
    return seen(model)


def author_for_strangers() -> dict:
    """Shares adapters with `custom_generate`, and then other weights without it."""
    from peft import get_peft_model
    from tiny_models import randomised
    from transformers import AutoModelForCausalLM

    from hf_mtp import GatedLoraConfig

    model = randomised(upgrade(AutoModelForCausalLM.from_pretrained("me/base"))).eval()
    first = model.push_to_hub("me/adapter", custom_generate=True)
    model.push_to_hub("me/on-a-branch", custom_generate=True, revision="trial")
    model.push_to_hub("me/private", custom_generate=True, private=True)
    constant = get_peft_model(AutoModelForCausalLM.from_pretrained("me/constant"), GatedLoraConfig(k=3, sampler=False))
    constant.push_to_hub("me/constant-mtp", custom_generate=True)
    randomised(model, seed=5).push_to_hub("me/adapter")
    proposed = model.push_to_hub("me/proposed", custom_generate=True, create_pr=True)
    return {"first": first.oid, "pull request": proposed.pr_url}


def upgrade(base):
    """An adapter as MTPTrainer would leave it."""
    from peft import get_peft_model
    from transformers import AutoTokenizer

    from hf_mtp import GatedLoraConfig
    from hf_mtp.adapter.base_identity import tokenizer_fingerprint

    config = GatedLoraConfig(k=3, r=4, recipe="default", train_datasets=["openai/gsm8k", "notes"])
    config.tokenizer_fingerprint = tokenizer_fingerprint(AutoTokenizer.from_pretrained("me/base"))
    config.tokens_per_pass = {"maths": 3.456}
    return get_peft_model(base, config)


def reader() -> dict:
    """Loads what the author shared, and what should be refused."""
    import pytest
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    from hf_mtp import GatedLoraConfig

    document = seen(AutoPeftModelForCausalLM.from_pretrained("me/my-model-mtp"))
    branch = AutoPeftModelForCausalLM.from_pretrained("me/on-a-branch", revision="trial")
    document["branch"] = seen(branch)
    tables = [AutoPeftModelForCausalLM.from_pretrained("me/with-ngrams", revision="trial").active_peft_config.ngrams]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        tables.append(GatedLoraConfig.from_pretrained("me/with-ngrams", revision="trial").ngrams)
    document["n-grams"] = [[step[0][0] for step in table.after([7], 3)] for table in tables]
    for name, base in (("me/pickled", "me/base"), ("me/my-model-mtp", "me/other-base")):
        try:
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), name)
        except ValueError as error:
            document[f"{name} on {base}"] = str(error)
    return document


def locked_out() -> dict:
    """What is said to somebody who may not read an adapter, or asks for one that does not exist."""
    from peft import AutoPeftModelForCausalLM, PeftModel
    from tiny_models import prompt
    from transformers import AutoModelForCausalLM
    from typer.testing import CliRunner

    from hf_mtp.attached import attach
    from hf_mtp.cli.app import app
    from hf_mtp.pretrained import load_model

    base = AutoModelForCausalLM.from_pretrained("me/base")
    options = {"trust_remote_code": True, "max_new_tokens": 4, "do_sample": False}
    ways = {
        "auto": AutoPeftModelForCausalLM.from_pretrained,
        "peft": lambda name: PeftModel.from_pretrained(base, name),
        "load_model": load_model,
        "attach": lambda name: attach(base, name),
        "custom_generate": lambda name: base.generate(prompt(), custom_generate=name, **options),
        "custom_generate of another": lambda name: base.generate(
            prompt(), custom_generate=f"me/names-{name[3:]}", **options
        ),
    }
    said = {}
    for name in ("me/gated", "me/private", "me/missing"):
        for way, load in ways.items():
            try:
                load(name)
            except Exception as error:
                said[f"{way} {name}"] = [str(error), repr(error.__context__)]
        for verb in (["generate", name, "w7"], ["push", name, "me/elsewhere"]):
            result = CliRunner().invoke(app, verb)
            said[f"{verb[0]} {name}"] = [result.output, str(result.exit_code)]
    return said


def trainer_pushes() -> dict:
    """Trains with each `hub_strategy`, and reads what came of it. The last one resumes from the Hub."""
    import tempfile

    from huggingface_hub import snapshot_download
    from peft import AutoPeftModelForCausalLM
    from tiny_models import upgraded
    from tiny_training import trainer
    from transformers import AutoModelForCausalLM

    from hf_mtp.training.recovery.checkpoint import damage_of

    document = {}
    with tempfile.TemporaryDirectory() as home:
        for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
            name = strategy.replace("_", "-")
            model, folder = upgraded(AutoModelForCausalLM.from_pretrained("me/base")), Path(home, name)
            if strategy == "end":
                model.save_pretrained(folder, custom_generate=True)
            pushing = {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": f"me/{name}"}
            saving = {"save_strategy": "steps", "save_steps": 2, "hub_always_push": True}
            trained = trainer(folder, model=model, **pushing, **saving)
            trained.train()
            if strategy == "end":
                trained.push_to_hub(dataset_name="me/words")
            document[strategy] = seen(model.eval())
            document[f"{strategy} read"] = seen(AutoPeftModelForCausalLM.from_pretrained(f"me/{name}"))
        last = Path(snapshot_download("me/checkpoint", allow_patterns="last-checkpoint/*"), "last-checkpoint")
        resumed = trainer(
            Path(home, "resumed"), max_steps=6, model=upgraded(AutoModelForCausalLM.from_pretrained("me/base"))
        )
        resumed.train(resume_from_checkpoint=str(last))
        document["resumed"] = [entry["step"] for entry in resumed.state.log_history if "loss" in entry]
        document["damage"] = damage_of(last)
        document["home"] = home
    return document


def seen(model) -> dict:
    """Weights and text of an upgraded model."""
    from tiny_models import adapter_parameters, generate, prompt

    weights = hashlib.sha256()
    for name, parameter in sorted(adapter_parameters(model).items()):
        weights.update(name.encode() + parameter.detach().numpy().tobytes())
    plain, upgraded = generate(model, prompt()), generate(model, prompt(), mtp=True)
    return {
        "weights": weights.hexdigest(),
        "plain": plain.tolist(),
        "upgraded": upgraded.tolist(),
        "forward_passes": model.mtp_statistics.forward_passes,
    }


if __name__ == "__main__":
    only_loopback()
    print(json.dumps(globals()[sys.argv[1]]()))
