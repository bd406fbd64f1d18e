#!/usr/bin/env python
"""Code completion: the body of a function from its signature and docstring, ended by a stop string.

python examples/scenarios/code_completion.py
"""

from scenario import Answers, Scenario

BEGINNINGS = [
    'def is_palindrome(text: str) -> bool:\n    """Whether a text reads the same backwards, ignoring case."""\n',
    'def count_words(text: str) -> dict[str, int]:\n    """How often each word occurs in a text."""\n',
    'class Stack:\n    """A stack with push, pop, peek and is_empty."""\n\n    def __init__(self):\n',
]
STOPS = ["\ndef ", "\nclass ", "\n#", "\nif ", "\nprint", "\n```"]  # the next thing at the left margin


def complete(model, tokenizer, new_tokens: int, **way) -> Answers:
    """Completes one function after the other."""
    answers = Answers(BEGINNINGS, [])
    for beginning in BEGINNINGS:
        inputs = tokenizer(beginning, return_tensors="pt").to(model.device)
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=new_tokens, stop_strings=STOPS, tokenizer=tokenizer, **way
        )
        answers.ids.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


SCENARIO = Scenario("code completion", complete, new_tokens=96)

if __name__ == "__main__":
    SCENARIO.main(__doc__)
