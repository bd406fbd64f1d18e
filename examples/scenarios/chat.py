#!/usr/bin/env python
"""Real-time chat: a conversation of several turns whose cache is kept, so that only what is new is read.

    python examples/scenarios/chat.py

The streamer measures how long the user waits for the first token of an answer.
"""

import time
from inspect import signature

from scenario import Answers, Scenario, asked
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from hf_mtp.base.caches import cache_name
from hf_mtp.decoding.drafters.acceptance import count_matching

SYSTEM = "You are a friendly travel guide. Answer in a few sentences."
TURNS = [
    "I have three days in Rome. What should I see first?",
    "What should I eat there?",
    "And how do I get from the airport to the city?",
]


class FirstToken(BaseStreamer):
    """Notes when the first new token comes. The first call has the prompt."""

    def __init__(self):
        self.calls, self.start, self.wait = 0, time.perf_counter(), None

    def put(self, value) -> None:
        self.calls += 1
        if self.calls == 2:
            self.wait = time.perf_counter() - self.start

    def end(self) -> None:
        pass


def talk(model, tokenizer, new_tokens: int, **method) -> Answers:
    """Answers one turn after the other."""
    answers, messages, read, cache = Answers(TURNS, []), [], [], DynamicCache(config=model.config)
    name = cache_name(signature(model.get_base_model().forward).parameters)  # `cache` since transformers 5.24
    for turn in TURNS:
        messages.append(turn)
        inputs, first = asked(tokenizer, *messages, system=SYSTEM).to(model.device), FirstToken()
        prompt = inputs["input_ids"][0].tolist()
        if surplus := len(read) - count_matching(read, prompt[:-1]):  # the template may write an answer otherwise
            cache.crop(-surplus)
        options = {"do_sample": False, "max_new_tokens": new_tokens, "streamer": first, name: cache, **method}
        ids = model.generate(**inputs, **options)[0].tolist()
        read = ids[:-1]  # nothing follows the last token yet, so the model has not read it
        answers.ids.append(ids[len(prompt) :])
        answers.waits.append(first.wait)
        messages.append(tokenizer.decode(answers.ids[-1], skip_special_tokens=True))
    return answers


SCENARIO = Scenario("real-time chat", talk, new_tokens=96)

if __name__ == "__main__":
    SCENARIO.main(__doc__)
