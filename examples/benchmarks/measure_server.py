#!/usr/bin/env python
"""Measure `hf-mtp serve`: what a server costs one client, and what it gives many.

python examples/benchmarks/measure_server.py ADAPTER --prompts PROMPTS.jsonl --output docs/results/server.json

The server is a process of its own. Three measurements:

- overhead: the same prompts by `generate(mtp=True)` in this process and by one client, in turn; medians over prompts;
- one at a time: one client for `--seconds`, the next request when the last one has ended;
- concurrent: `--clients` clients for `--seconds`.

The processor's time of the server per token is there for machines that are busy with other things.

Every response is compared with that of `generate(mtp=False)`. Prompts are JSON Lines, each with a `prompt`: a text or
messages. The last line of the output is one JSON document. `--output` is written after each measurement.
"""

import argparse
import concurrent.futures
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from itertools import cycle, islice
from pathlib import Path
from urllib.request import urlopen

import openai
from report import finish, save

from hf_mtp.base.machine import describe_machine
from hf_mtp.evaluation.run import adapter_fingerprint
from hf_mtp.pretrained import load_model, load_tokenizer


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="Hub id or folder of an adapter")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON Lines, each with a `prompt`")
    parser.add_argument("--output", type=Path, help="where to write the JSON document")
    parser.add_argument("--clients", type=int, default=16, help="concurrent clients (%(default)s)")
    parser.add_argument("--seconds", type=float, default=120, help="length of each of the two loads (%(default)s)")
    parser.add_argument("--count", type=int, default=16, help="prompts to use, from the first (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of a response (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="times that the overhead is measured (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights (%(default)s)")
    return parser.parse_args()


class Bench:
    """A server, the texts that it must give, and clients."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        lines = args.prompts.read_text(encoding="utf-8").splitlines()
        self.chats = dict(_chat(json.loads(line)["prompt"]) for line in lines[: args.count])
        self.prompts = [*self.chats]
        print(f"Loading the model, and decoding {len(self.prompts)} prompts plainly.", flush=True)
        self.model = load_model(args.adapter, args.dtype).eval()
        self.tokenizer = load_tokenizer(args.adapter, self.model)
        self.plain = {prompt: self.generate(prompt, mtp=False) for prompt in self.prompts}
        self.root, self.server = self._start()
        self.client = openai.OpenAI(base_url=f"{self.root}/v1", api_key="none", max_retries=0, timeout=600)

    def _start(self) -> tuple[str, subprocess.Popen]:
        """Starts the server and waits until it answers: its address and its process."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "hf_mtp.cli.main", "serve", self.args.adapter, "--port", str(port)]
        server = subprocess.Popen([*command, "--max-batch", str(self.args.clients), "--dtype", self.args.dtype])
        root = f"http://127.0.0.1:{port}"
        while server.poll() is None:
            try:
                with urlopen(f"{root}/health"):
                    return root, server
            except OSError:
                time.sleep(0.5)
        raise RuntimeError("The server ended before it answered; its output is above.")

    def generate(self, prompt: str, mtp: bool = True) -> str:
        """The text by `generate` in this process."""
        tokenizer, model = self.tokenizer, self.model
        inputs = tokenizer.apply_chat_template(
            self.chats[prompt], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**inputs, mtp=mtp, max_new_tokens=self.args.new_tokens, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def ask(self, prompt: str) -> tuple[str, int]:
        """The text by a client, and its number of tokens."""
        response = self.client.chat.completions.create(
            model=self.args.adapter, messages=self.chats[prompt], max_tokens=self.args.new_tokens, temperature=0
        )
        return response.choices[0].message.content, response.usage.completion_tokens

    def overhead(self) -> dict:
        """Seconds per prompt in this process and by one client, in turn."""
        seconds = {"in_process": [], "one_client": []}
        for call in (self.generate, self.ask):
            call(self.prompts[0])  # warm-up
        for number, prompt in enumerate(self.prompts, start=1):
            for way, call in (("in_process", self.generate), ("one_client", self.ask)):
                times = []
                for _ in range(self.args.rounds):
                    start = time.perf_counter()
                    call(prompt)
                    times.append(time.perf_counter() - start)
                seconds[way].append(min(times))
            own, served = (values[-1] for values in seconds.values())
            print(f"prompt {number}: {own:.2f} s in this process, {served:.2f} s by a client", flush=True)
        ratios = [served / own for own, served in zip(seconds["in_process"], seconds["one_client"], strict=True)]
        return {
            **{f"{way}_seconds": statistics.median(values) for way, values in seconds.items()},
            "overhead": statistics.median(ratios) - 1,
        }

    def load(self, clients: int) -> dict:
        """Tokens per second of so many clients, and how many responses were not plain decoding's."""
        print(f"{clients} at a time for {self.args.seconds:.0f} s.", flush=True)
        end = time.perf_counter() + self.args.seconds
        start, before = time.perf_counter(), self._counts()

        def work(number: int) -> list[tuple[str, str, int, float]]:
            done = []
            for prompt in islice(cycle(self.prompts), number % len(self.prompts), None):
                if time.perf_counter() >= end:
                    return done
                began = time.perf_counter()
                try:
                    text, tokens = self.ask(prompt)
                except openai.APIError as error:
                    text, tokens = f"failed: {error}", 0
                done.append((prompt, text, tokens, time.perf_counter() - began))
            return done

        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            done = [response for part in pool.map(work, range(clients)) for response in part]
        seconds, after = time.perf_counter() - start, self._counts()
        spent = {name: after[name] - before[name] for name in before}
        tokens = sum(tokens for *_, tokens, _ in done)
        return {
            "clients": clients,
            "seconds": seconds,
            "requests": len(done),
            "failures": sum(tokens == 0 for *_, tokens, _ in done),
            "other_than_plain": sum(text != self.plain[prompt] for prompt, text, *_ in done),
            "of_another_prompt": sum(self._belongs_elsewhere(prompt, text) for prompt, text, *_ in done),
            "tokens_per_second": tokens / seconds,
            "cpu_milliseconds_per_token": 1000 * spent["process_cpu_seconds_total"] / max(1, tokens),
            "tokens_per_pass": tokens / max(1, spent["hf_mtp_row_passes_total"]),
            "rows_per_pass": spent["hf_mtp_row_passes_total"] / max(1, spent["hf_mtp_forward_passes_total"]),
            "median_seconds": statistics.median(seconds for *_, seconds in done),
        }

    def _belongs_elsewhere(self, prompt: str, text: str) -> bool:
        """Whether a response is that of another prompt: in half precision, a differing one need not be."""
        return text != self.plain[prompt] and text in self.plain.values()

    def _counts(self) -> dict[str, float]:
        """Some of the server's metrics."""
        with urlopen(f"{self.root}/metrics") as response:
            lines = response.read().decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        names = ("hf_mtp_row_passes_total", "hf_mtp_forward_passes_total", "process_cpu_seconds_total")
        return {name: float(values[name]) for name in names}

    def stop(self) -> None:
        """Stops the server."""
        self.server.terminate()
        self.server.wait()


def _chat(prompt: str | list[dict]) -> tuple[str, list[dict]]:
    """A name for a prompt, and its messages."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return messages[-1]["content"], messages


def main() -> None:
    """Runs the measurements."""
    args = parse_args()
    bench = Bench(args)
    report = {
        "adapter": adapter_fingerprint(bench.model),
        "parameters": sum(
            parameter.numel()
            for name, parameter in bench.model.get_base_model().named_parameters()
            if "lora_" not in name  # PEFT adds these to the base's layers
        ),
        "new_tokens": args.new_tokens,
        "prompts": len(bench.prompts),
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "machine": describe_machine(),
        "load_average": round(os.getloadavg()[0], 1),
    }
    try:
        report["overhead"] = bench.overhead()
        report["loads"] = []
        for clients in (1, args.clients):
            save(report, args.output)
            report["loads"].append(bench.load(clients))
            print(summary(report["loads"][-1]), flush=True)
    finally:
        bench.stop()
    print(f"overhead at one client: {report['overhead']['overhead']:.1%}")
    finish(report, args.output)


def summary(load: dict) -> str:
    """One line on a load."""
    return (
        f"{load['clients']} clients: {load['tokens_per_second']:.1f} tokens/s, {load['requests']} requests, "
        f"{load['failures']} failures, {load['other_than_plain']} other texts than plain decoding's"
    )


if __name__ == "__main__":
    main()
