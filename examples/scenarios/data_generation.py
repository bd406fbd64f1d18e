#!/usr/bin/env python
"""Batch generation of data: questions and answers for many topics at once, as JSON Lines.

python examples/scenarios/data_generation.py
"""

from scenario import Answers, Scenario, chat_text

TOPICS = ["rain", "bread", "the moon", "bicycles", "honey bees", "volcanoes", "money", "libraries"]
ASK = "Write one question that a child may ask about {topic}, and a short answer. Begin with 'Question:'."


def generate_data(model, tokenizer, new_tokens: int, **method) -> Answers:
    """Answers all prompts in one batch. Rows with more accepted drafts do not wait for the others."""
    prompts = [ASK.format(topic=topic) for topic in TOPICS]
    texts = [chat_text(tokenizer, prompt) for prompt in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False).to(
        model.device
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, **method)
    row_passes = model.mtp_statistics.row_passes if method else None
    return Answers(prompts, output[:, inputs["input_ids"].shape[1] :].tolist(), row_passes=row_passes)


SCENARIO = Scenario(
    "batch generation of data", generate_data, new_tokens=64, bitwise=False
)  # which would need prompts of one length

if __name__ == "__main__":
    SCENARIO.main(__doc__)
