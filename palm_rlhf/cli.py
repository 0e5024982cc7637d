"""The console script ``palm-rlhf``: it imports the module of the named subcommand only."""

import argparse
import importlib
import io
import os
import sys
from typing import NamedTuple

import palm_rlhf
from palm_rlhf.ops.cpu.threads import share_the_machine


class Command(NamedTuple):
    """The module and function of a subcommand, and the first sentence of its docstring."""

    module: str
    function: str
    summary: str


COMMANDS = {
    "info": Command(
        "palm_rlhf.commands.info_command",
        "info",
        "Print the versions and devices in use, and which kernels and kinds of attention can run here or why not.",
    ),
    "generate": Command(
        "palm_rlhf.commands.generate_command",
        "generate",
        "Continue a text, printing it as it is sampled.",
    ),
    "train": Command(
        "palm_rlhf.commands.train_command",
        "train",
        "Train a language model on text, a new one or an existing one, and sample from it.",
    ),
    "sft": Command(
        "palm_rlhf.commands.sft_command",
        "sft",
        "Fine-tune a model on conversations; adapters (--lora-r) are merged at the end, or saved alone (--no-merge).",
    ),
    "reward": Command(
        "palm_rlhf.commands.reward_command",
        "reward",
        "Train a reward model on rankings of replies, or on pairs of a chosen and a rejected one.",
    ),
    "rlhf": Command(
        "palm_rlhf.commands.rlhf_command",
        "rlhf",
        "Improve a model by reinforcement learning from rewards, models or functions: PPO, GRPO or RLOO (--algorithm).",
    ),
    "inspect": Command(
        "palm_rlhf.commands.inspect_command",
        "inspect",
        "Write a page that shows a run of reinforcement learning token by token.",
    ),
    "dpo": Command(
        "palm_rlhf.commands.dpo_command",
        "dpo",
        "Train a model on pairs of a chosen and a rejected reply by DPO, or another --loss; no reward model.",
    ),
    "online-dpo": Command(
        "palm_rlhf.commands.online_dpo_command",
        "online_dpo",
        "Improve a model by DPO, or another --loss of pairs, on its own replies, which rewards compare.",
    ),
    "collect": Command(
        "palm_rlhf.feedback.collect_command",
        "collect",
        "Open a web site on which people write, label and rank messages, and compare answers of models.",
    ),
    "learn": Command(
        "palm_rlhf.commands.learn_command",
        "learn",
        "Improve a model by what people said of its answers: a reward model, PPO, and a blind comparison with the old.",
    ),
    "export": Command(
        "palm_rlhf.commands.export_command",
        "export",
        "Write a database of feedback to a file of records, or a model for llama.cpp or Hugging Face.",
    ),
    "import": Command(
        "palm_rlhf.commands.import_command",
        "import_feedback",
        "Add Open-Assistant's trees, or a file of preferences, to a database of feedback.",
    ),
    "chat": Command(
        "palm_rlhf.serving.chat",
        "chat",
        "Talk with a model in the terminal: it remembers what was said, and its replies come word by word.",
    ),
    "serve": Command(
        "palm_rlhf.commands.serve_command",
        "serve",
        "Answer over HTTP in OpenAI's protocol, with a chat page at /, until it is interrupted.",
    ),
    "plan": Command(
        "palm_rlhf.commands.plan_command",
        "plan",
        "Add up the memory of a task part by part, without weights, and name the setting that fits and gives up least.",
    ),
    "data": Command(
        "palm_rlhf.data.data_command",
        "data",
        "Clean, filter and convert conversations and preferences, whatever the size of the file.",
    ),
    "evaluate": Command(
        "palm_rlhf.evaluation.evaluate_command",
        "evaluate",
        "Judge answers, count preferences and win rates, measure models and runs, and write reports.",
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the top level, which knows the names of the subcommands only."""
    parser = argparse.ArgumentParser(prog="palm-rlhf", description=palm_rlhf.__doc__)
    parser.add_argument("--version", action="version", version=f"palm-rlhf {palm_rlhf.__version__}")
    subparsers = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, description="`palm-rlhf COMMAND --help` explains each."
    )
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.summary, add_help=False)
    return parser


def replace_unprintable_characters() -> None:
    """Make standard output and error print ? for a character that their encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def run(name: str, args: list[str]) -> None:
    """Run one subcommand with its arguments."""
    share_the_machine()
    import tyro

    command = COMMANDS[name]
    function = getattr(importlib.import_module(command.module), command.function)
    tyro.cli(function, prog=f"palm-rlhf {name}", args=args)


def main(args: list[str] | None = None) -> None:
    """Run the subcommand that the arguments name; by default the arguments of the process."""
    args = sys.argv[1:] if args is None else args
    replace_unprintable_characters()
    try:
        if not args or args[0] not in COMMANDS:
            build_parser().parse_args(args)  # --help, --version or an error: each ends the process
        run(args[0], args[1:])
    except BrokenPipeError:
        # The reader of the pipe is gone. Python would raise again when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"palm-rlhf: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
