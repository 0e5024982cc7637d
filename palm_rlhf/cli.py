"""The console script `palm-rlhf`: subcommands whose options are the parameters of the functions below."""

import codecs
import importlib.metadata
import platform
import sys
from pathlib import Path

import torch
import tyro
from beartype import beartype
from tyro.conf import Positional

from palm_rlhf import PaLM, __version__
from palm_rlhf.ops.attention import available_implementations

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


def info() -> None:
    """Print the versions and devices that count, and which attention implementations can run here or why not."""
    implementations = available_implementations().items()
    rows = {
        "palm-rlhf": [__version__],
        "python": [f"{platform.python_version()} on {platform.system()} {platform.machine()}"],
        "torch": [torch.__version__],
        "triton": [triton_version()],
        "devices": devices(),
        "attention": [f"{name}: {f'refused, {reason}' if reason else 'usable'}" for name, reason in implementations],
    }
    for name, lines in rows.items():
        for label, line in zip((name, *[""] * len(lines)), lines):
            print(f"{label:<11}{line}")


@beartype
def generate(
    checkpoint: Positional[Path],
    *,
    prompt: str,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float | None = None,
    seed: int | None = None,
) -> None:
    """Continue a text with a byte-level model, printing it as it is sampled.

    Args:
        checkpoint: A folder written by save_pretrained.
        prompt: The text to continue; it is not printed again.
        max_new_tokens: How many bytes to sample.
        temperature: Divides the logits before sampling; 0 always takes the likeliest byte.
        top_p: Sample from the fewest bytes that hold this much of the probability; all of them by default.
        seed: Makes the sample repeatable; another one each time by default.
    """
    palm = PaLM.from_pretrained(str(checkpoint)).eval()
    num_tokens = palm.config.num_tokens
    if num_tokens > NUM_BYTES:
        raise ValueError(
            f"{checkpoint} has {num_tokens} tokens, but this command writes each token as one byte, so it takes models "
            f"of at most {NUM_BYTES}: use PaLM.from_pretrained with the tokenizer that the model was trained with"
        )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    # A character can span several bytes: the decoder holds an unfinished one back until the rest has come.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    steps = palm.stream(
        prompt=torch.tensor(list(prompt.encode("utf-8"))),
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
    try:
        tyro.extras.subcommand_cli_from_dict({"info": info, "generate": generate}, prog="palm-rlhf", args=args)
    except (ValueError, OSError) as error:
        sys.exit(f"palm-rlhf: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
