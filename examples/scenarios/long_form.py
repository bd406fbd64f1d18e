#!/usr/bin/env python
"""Long-form writing: one long text, kept from repeating itself by a repetition penalty.

python examples/scenarios/long_form.py
"""

from scenario import Answers, Scenario, asked

TASK = "Write an article about the history of lighthouses: how they were built, who kept them, and how they changed."


def write(model, tokenizer, new_tokens: int, **method) -> Answers:
    """Writes the text."""
    inputs = asked(tokenizer, TASK).to(model.device)
    output = model.generate(**inputs, do_sample=False, repetition_penalty=1.1, max_new_tokens=new_tokens, **method)
    return Answers([TASK], [output[0, inputs["input_ids"].shape[1] :].tolist()])


SCENARIO = Scenario("long-form writing", write, new_tokens=512)

if __name__ == "__main__":
    SCENARIO.main(__doc__)
