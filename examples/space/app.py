"""A Space that races plain decoding against multi-token prediction: `hf-mtp demo` with an adapter of its own."""

import os
from pathlib import Path

from hf_mtp.demo.app import Demo, DemoSettings

ADAPTER = os.environ.get("ADAPTER") or str(Path(__file__).with_name("adapter"))

if __name__ == "__main__":
    Demo(DemoSettings(ADAPTER, host="0.0.0.0")).run()
