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
# First what users call, then the parts behind it.
SECTIONS = {
    "Configuration": {"hf_mtp.adapter.config": ["GatedLoraConfig"]},
    "Loading by name": {
        "hf_mtp.pretrained": ["load_model", "load_tokenizer"],
        "hf_mtp.data.rows": ["load_rows"],
    },
    "Training": {
        "hf_mtp.training.config": ["MTPConfig"],
        "hf_mtp.training.trainer": ["MTPTrainer"],
        "hf_mtp.objective.recipe": ["Recipe"],
        "hf_mtp.data.responses": ["regenerate_responses"],
        "hf_mtp.training.callbacks.decoding": ["DecodingCallback"],
        "hf_mtp.objective.request": ["ObjectiveRequest"],
        "hf_mtp.objective.compute": ["batch_objective", "Objective"],
        "hf_mtp.passes.training_pass": ["TrainingPass"],
        "hf_mtp.objective.chunked_backward": ["ChunkedBackward"],
        "hf_mtp.training.recovery.checkpoint": ["WholeCheckpoints"],
    },
    "Generation": {
        "hf_mtp.decoding.generate": ["GenerationMixin.generate"],
        "hf_mtp.decoding.statistics": ["MTPGenerateOutput", "MTPStatistics"],
        "hf_mtp.evaluation.support": ["check_support", "SupportReport"],
        "hf_mtp.passes.speculation_mode": ["SpeculationMode", "speculation_mode"],
        "hf_mtp.base.lora_layers": ["layers_out_of_reach"],
        "hf_mtp.evaluation.compare": ["decode_both_ways", "summarize", "Record", "describe_machine"],
    },
    "The decode loop": {
        "hf_mtp.decoding.loop": ["DecodingLoop", "DecodingLoop.step"],
        "hf_mtp.decoding.sequence": ["Sequence"],
        "hf_mtp.decoding.batch": ["Batch", "Batch.admit", "Batch.retire"],
        "hf_mtp.decoding.drafters.base": ["Drafts", "Drafter", "Drafter.expect", "Drafter.propose", "Drafter.observe"],
        "hf_mtp.decoding.drafters.masks": ["MaskDrafter", "draft"],
        "hf_mtp.decoding.drafters.ngrams": ["NgramDrafter"],
        "hf_mtp.decoding.schedule.fixed": ["FixedSchedule"],
        "hf_mtp.decoding.schedule.adaptive": ["AdaptiveSchedule"],
        "hf_mtp.decoding.schedule.costs": ["PassCosts"],
        "hf_mtp.decoding.noise": ["PositionNoise"],
        "hf_mtp.decoding.streaming": ["PassStreamer"],
        "hf_mtp.decoding.verifier": ["Verifier"],
        "hf_mtp.decoding.verification": ["chosen_tokens", "verify_together", "verify_in_order"],
        "hf_mtp.decoding.processors": ["Order", "order_of"],
        "hf_mtp.decoding.prefill": ["read_by_base"],
    },
    "Serving": {
        "hf_mtp.serving.server": ["Server", "Server.run", "ServerSettings"],
        "hf_mtp.serving.limits": ["Limits"],
        "hf_mtp.serving.engine": ["Engine", "Engine.submit", "Engine.stop"],
        "hf_mtp.serving.request": ["Request", "row_of"],
        "hf_mtp.serving.rules": ["Rules", "RowVerifier"],
        "hf_mtp.serving.text": ["TextStream", "StopStrings"],
        "hf_mtp.serving.metrics": ["Metrics"],
    },
    "The upgraded model": {
        "hf_mtp.model": ["GatedLoraModel", "GatedLoraModel.forward"],
        "hf_mtp.passes.decoding_pass": ["DecodingPass", "PassOutput"],
        "hf_mtp.passes.recurrent_pass": ["RecurrentPass", "RecomputePass"],
        "hf_mtp.cache.rollback": ["RollbackCache"],
        "hf_mtp.cache.sequence": ["SequenceCache", "TextCache"],
        "hf_mtp.adapter.gate": ["Gate", "GatedVariant", "MaskColumns"],
        "hf_mtp.adapter.sampler": ["SamplerHead"],
    },
    "Functions of tensors": {
        "hf_mtp.layout.blocks": [
            "BlockLayout",
            "training_layout",
            "weight_of_all_masks",
            "useful_anchors",
            "decoding_layout",
            "segments",
        ],
        "hf_mtp.layout.attention": ["allowed_attention", "attention_masks", "attention_kinds", "CachedColumns"],
        "hf_mtp.objective.losses": [
            "cross_entropy",
            "latent_consistency",
            "feature_consistency",
        ],
        "hf_mtp.objective.simulation": ["simulate_decoding", "mean_tokens_per_step", "SimulatedDecoding"],
        "hf_mtp.layout.mask_plan": ["MaskPlan", "choose_masks", "landing_probability", "mask_values"],
    },
}


def render() -> str:
    """The whole page."""
    lines = ["# Package reference", "", "`docs/make_reference.py` writes this page from the docstrings.", ""]
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
