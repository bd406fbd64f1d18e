#!/usr/bin/env python
"""Step-by-step mathematics: word problems, solved with all steps.

python examples/scenarios/mathematics.py
"""

from scenario import Answers, Scenario, asked

PROBLEMS = [
    "A baker makes 24 rolls in the morning and twice as many in the afternoon. She sells all but 9 of them for $2 "
    "each. How much money does she earn?",
    "A train travels 180 miles in 3 hours. How far does it travel in 7 hours at the same speed?",
]


def solve(model, tokenizer, new_tokens: int, **method) -> Answers:
    """Solves one problem after the other."""
    answers = Answers(PROBLEMS, [])
    for problem in PROBLEMS:
        inputs = asked(tokenizer, f"{problem} Think step by step.").to(model.device)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, **method)
        answers.ids.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


SCENARIO = Scenario("step-by-step mathematics", solve, new_tokens=160)

if __name__ == "__main__":
    SCENARIO.main(__doc__)
