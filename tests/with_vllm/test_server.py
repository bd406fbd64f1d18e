"""vLLM's OpenAI-compatible server with an adapter, as `hf-mtp serve --engine vllm` starts it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import engine
import psutil
import pytest

from hf_mtp.serving.vllm.arguments import command_line, engine_arguments


class Server:
    """A server, and what a client asks it."""

    def __init__(self, case, log):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        own = {**engine.SMALL, **engine_arguments(case.adapter, strategy="linear"), "served_model_name": "mine"}
        del own["disable_log_stats"]
        options = command_line({**own, "host": "127.0.0.1", "port": self.port})
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        self.log, said = log, log.open("w")
        self.process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)

    def wait(self) -> None:
        for _ in range(1800):
            assert self.process.poll() is None, self.log.read_text()[-6000:]
            try:
                return self.get("/health")
            except OSError:
                time.sleep(1)
        raise TimeoutError(self.log.read_text()[-6000:])

    def get(self, path: str) -> str:
        return urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60).read().decode()

    def complete(self, prompt: list[int], **options) -> dict:
        body = {"model": "mine", "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True, **options}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps({**body, "return_token_ids": True}).encode(),
            {"Content-Type": "application/json"},
        )
        return json.load(urllib.request.urlopen(request, timeout=300))["choices"][0]


@pytest.fixture(scope="module")
def server(case, tmp_path_factory):
    started = Server(case(), tmp_path_factory.mktemp("server") / "log")
    try:
        started.wait()
        yield started
    finally:
        children = (
            psutil.Process(started.process.pid).children(recursive=True) if started.process.poll() is None else []
        )
        for process in (started.process, *children):
            process.kill()


def test_concurrent_clients_get_their_own_answers(case, server):
    rows = case().rows * 5
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda row: server.complete(row["prompt"]), rows))
    assert [answer["token_ids"] for answer in answers] == [row["tokens"] for row in rows]
    metrics = server.get("/metrics")
    accepted = [
        line for line in metrics.splitlines() if line.startswith("vllm:spec_decode_num_accepted_tokens_total{")
    ]
    assert float(accepted[0].split()[-1]) >= 5 * case().accepted


def test_grammars_and_what_is_refused(case, server):
    prompt = case().prompts[0]
    answer = server.complete(prompt, structured_outputs={"regex": "w1[0-9]w2[0-9]"}, ignore_eos=False)
    assert answer["text"].split()[0][:2] == "w1" and answer["finish_reason"] == "stop"
    sampling = {"min_p": 0.1, "temperature": 1.0}
    for words, refused in ((prompt, sampling), (None, {"prompt_embeds": "AAAA"}), (prompt, {"model": "other"})):
        with pytest.raises(urllib.error.HTTPError) as error:
            server.complete(words, **refused)
        assert 400 <= error.value.code < 500
    assert server.complete(prompt)["token_ids"] == case().rows[0]["tokens"]


def test_a_killed_engine_ends_the_server(case, server):
    """The last test of this file. Clients get an error, and the process ends."""
    engines = [
        child for child in psutil.Process(server.process.pid).children(recursive=True) if "EngineCore" in child.name()
    ]
    with ThreadPoolExecutor(4) as clients:
        running = [clients.submit(server.complete, case().prompts[0], max_tokens=120) for _ in range(4)]
        for child in engines or psutil.Process(server.process.pid).children():
            child.send_signal(signal.SIGKILL)
        failures = [future.exception() for future in running]
    assert all(failure is None or isinstance(failure, OSError) for failure in failures) and any(failures)
    server.process.wait(120)
    assert "EngineDeadError" in server.log.read_text() or "died" in server.log.read_text()
