"""A script that does not import hf_mtp and generates with a shared adapter. Run by test_custom_generate.py.

Its arguments are the base, the adapter and further arguments of `generate` as JSON. It prints one JSON document: what
it saw.
"""

import json
import sys

import torch
from hub_sessions import only_loopback
from transformers import AutoModelForCausalLM


def main(base_name: str, adapter: str, options: str) -> dict:
    base = AutoModelForCausalLM.from_pretrained(base_name)
    imported_before = "hf_mtp" in sys.modules
    ids, settings = torch.arange(20, 31)[None], {"max_new_tokens": 20, "do_sample": False}
    plain = base.generate(ids, **settings)
    output = base.generate(
        ids,
        custom_generate=adapter,
        trust_remote_code=True,
        mtp_strategy="quadratic",
        return_dict_in_generate=True,
        **settings,
        **json.loads(options),
    )
    return {
        "imported before": imported_before,
        "plain": plain.tolist(),
        "upgraded": output.sequences.tolist(),
        "plain afterwards": base.generate(ids, **settings).tolist(),
        "forward_passes": output.mtp_statistics.forward_passes,
    }


if __name__ == "__main__":
    only_loopback()
    print(json.dumps(main(*sys.argv[1:])))
