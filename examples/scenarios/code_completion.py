#!/usr/bin/env python
"""Code completion: the body of a function from its signature and docstring, ended by a stop string.

python examples/scenarios/code_completion.py
"""

from scenario import Answers, Scenario, chat_text

BEGINNINGS = [
    'def count_words(text: str) -> dict[str, int]:\n    """How often each word occurs in a text."""',
    'class Stack:\n    """A stack with push, pop, peek and is_empty."""\n\n    def __init__(self):',
]
ASK = "Complete this Python code.\n\n"
FENCE = "```python\n"


def complete(model, tokenizer, new_tokens: int, **method) -> Answers:
    """Completes one piece of code after the other. The answer begins with it, in a block that the stop string ends."""
    answers = Answers(BEGINNINGS, [])
    for beginning in BEGINNINGS:
        text = chat_text(tokenizer, ASK + beginning) + FENCE + beginning
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
        options = {"do_sample": False, "max_new_tokens": new_tokens, "stop_strings": ["\n```"], "tokenizer": tokenizer}
        output = model.generate(**inputs, **options, **method)
        answers.ids.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


SCENARIO = Scenario("code completion", complete, new_tokens=96)

if __name__ == "__main__":
    SCENARIO.main(__doc__)
