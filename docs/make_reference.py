#!/usr/bin/env python
"""Write docs/reference.md from the docstrings of the package.

python docs/make_reference.py            # writes it
python docs/make_reference.py --check    # exits with 1 if it is out of date
"""

import importlib
import inspect
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("reference.md")
# What users call first, then what the parts are made of.
SECTIONS = {
    "Configuration": {"hf_mtp.config": ["GatedLoraConfig"]},
    "Training": {
        "hf_mtp.training_config": ["MTPConfig"],
        "hf_mtp.trainer": ["MTPTrainer"],
        "hf_mtp.recipe": ["Recipe"],
        "hf_mtp.responses": ["regenerate_responses"],
        "hf_mtp.decoding_callback": ["DecodingCallback"],
        "hf_mtp.objective": ["multi_token_objective", "Objective"],
        "hf_mtp.training_pass": ["TrainingPass"],
        "hf_mtp.partial_backward": ["PartialBackward"],
        "hf_mtp.checkpoint": ["WholeCheckpoints"],
    },
    "Generation": {
        "hf_mtp.generation": ["MTPGenerationMixin.generate"],
        "hf_mtp.statistics": ["MTPGenerateOutput", "MTPStatistics"],
        "hf_mtp.check": ["check_support", "SupportReport"],
        "hf_mtp.reading": ["Reading", "reading_of"],
        "hf_mtp.targets": ["layers_out_of_reach"],
        "hf_mtp.prefill": ["read_by_base"],
        "hf_mtp.measuring": ["decode_both_ways", "summarize", "Record", "describe_machine"],
    },
    "The upgraded model": {
        "hf_mtp.tuner": [
            "GatedLoraModel",
            "GatedLoraModel.forward",
        ],
        "hf_mtp.step": ["MaskedStep", "StepOutput"],
        "hf_mtp.sequence": ["SequenceStep", "SequenceCache", "WholeTextStep", "WholeTextCache"],
        "hf_mtp.gate": ["Gate", "GatedVariant", "MaskColumns"],
        "hf_mtp.sampler": ["SamplerHead"],
    },
    "Functions of tensors": {
        "hf_mtp.layout": ["BlockLayout", "training_layout", "weight_of_all_masks", "decoding_layout", "segments"],
        "hf_mtp.masks": ["allowed_attention", "attention_masks", "attention_kinds", "CachedColumns"],
        "hf_mtp.losses": [
            "cross_entropy",
            "latent_consistency",
            "feature_consistency",
        ],
        "hf_mtp.simulation": ["walk_through", "mean_tokens_per_step", "Walk"],
        "hf_mtp.slots": ["Slots", "choose_slots", "landing_probability", "slot_values"],
        "hf_mtp.pacing": ["Whole", "Pacer"],
        "hf_mtp.drafting": ["draft", "Drafts", "Draw"],
        "hf_mtp.verification": ["accepted_drafts", "next_token", "verify_together", "verify_in_order"],
        "hf_mtp.transcript": ["Transcript"],
        "hf_mtp.cache": ["RollbackCache"],
    },
}


def render() -> str:
    """The whole page."""
    lines = ["# Package reference", "", "Made from the docstrings by `docs/make_reference.py`.", ""]
    for section, modules in SECTIONS.items():
        lines += [f"## {section}", ""]
        for module, names in modules.items():
            for name in names:
                lines += [*entry(module, name), ""]
    return "\n".join(lines)


def entry(module: str, name: str) -> list[str]:
    """Heading, names of the arguments and docstring of one name."""
    target = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    call = "" if inspect.isclass(target) else f"({', '.join(inspect.signature(target).parameters)})"
    return [f"### `{module}.{name}{call}`", "", "```text", inspect.getdoc(target), "```"]


def main() -> None:
    page = render()
    if "--check" in sys.argv[1:]:
        sys.exit(PAGE.read_text(encoding="utf-8") != page and "docs/reference.md is out of date: run this script")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
