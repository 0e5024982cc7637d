"""The console script `palm-rlhf`: subcommands whose options are the parameters of the functions below."""

import codecs
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro
from beartype import beartype
from tyro.conf import Positional, arg

import palm_rlhf
from palm_rlhf import PaLM, __version__
from palm_rlhf.data.commands import data
from palm_rlhf.evaluation.commands import evaluate
from palm_rlhf.ops import native
from palm_rlhf.ops.attention import available_implementations
from palm_rlhf.serving.chat import chat
from palm_rlhf.serving.commands import serve

NUM_BYTES = 256


def triton_version() -> str:
    """The installed Triton, or what its absence means."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed: its kernels are left out, everything else works"


def devices() -> list[str]:
    """One line for each device that torch can compute on here."""
    found = [f"cpu: {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        major, minor = properties.major, properties.minor
        memory = properties.total_memory / 2**30
        found.append(f"cuda:{index}: {properties.name}, compute capability {major}.{minor}, {memory:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("mps: Apple GPU")
    return found


def usable(refusal: str | None) -> str:
    """What a user reads of something that may be refused."""
    return "usable" if refusal is None else f"refused, {refusal}"


def attention_implementations() -> list[str]:
    """One line for each way to compute attention on each kind of device here: usable, or why not."""
    return [
        f"{name} on {device}: {usable(reason)}"
        for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]
        for name, reason in available_implementations(device).items()
    ]


def info() -> None:
    """Print the versions and devices in use, and which kernels and kinds of attention can run here or why not."""
    rows = {
        "palm-rlhf": [__version__],
        "python": [f"{platform.python_version()} on {platform.system()} {platform.machine()}"],
        "torch": [torch.__version__],
        "triton": [triton_version()],
        "devices": devices(),
        "native": [f"C kernels: {usable(native.refusal())}"],
        "attention": attention_implementations(),
    }
    for name, lines in rows.items():
        for label, line in zip((name, *[""] * len(lines)), lines):
            print(f"{label:<11}{line}")


@beartype
def generate(
    checkpoint: Annotated[Positional[Path], arg(metavar="CHECKPOINT")],
    *,
    prompt: str,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: Annotated[int | None, arg(metavar="INT")] = None,
) -> None:
    """Continue a text with a byte-level model, printing it as it is sampled.

    Args:
        checkpoint: A folder written by save_pretrained.
        prompt: The text to continue; it is not printed again.
        max_new_tokens: How many bytes to sample.
        temperature: Divides the logits before sampling; 0 always takes the likeliest byte.
        top_p: Samples from the fewest bytes that hold this much of the probability; 1 takes all.
        seed: Makes the sample repeatable; another one each time by default.
    """
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} is no folder: expected one that save_pretrained wrote")
    palm = PaLM.from_pretrained(checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
    if palm.num_tokens > NUM_BYTES:
        raise ValueError(
            f"{checkpoint} has {palm.num_tokens} tokens, but this command writes each token as one byte, so it takes "
            f"at most {NUM_BYTES}: use PaLM.from_pretrained with the tokenizer that the model was trained with"
        )
    generator = None if seed is None else torch.Generator(palm.device).manual_seed(seed)
    # A character can span several bytes: the decoder holds an unfinished one back until the rest has come.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    steps = palm.stream(
        torch.tensor(list(prompt.encode("utf-8", errors="surrogateescape"))),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        generator=generator,
    )
    for token in steps:
        print(decoder.decode(bytes(token.tolist())), end="", flush=True)
    print(decoder.decode(b"", final=True))


@beartype
def main(args: list[str] | None = None) -> None:
    """Run the subcommand that the arguments name; those of the process by default."""
    subcommands = {
        "info": info,
        "generate": generate,
        "chat": chat,
        "serve": serve,
        "data": data,
        "evaluate": evaluate,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(subcommands, prog="palm-rlhf", description=palm_rlhf.__doc__, args=args)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it flushes that at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"palm-rlhf: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
