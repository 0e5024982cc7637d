"""Fine-tune a PaLM on conversations, measure how many of its replies end by themselves, and chat.

python examples/sft.py                                       # the English dialogues of the package chatterbot-corpus
python examples/sft.py --model smollm2                       # a real chat model learns to answer as these dialogues do
python examples/sft.py --model DIR --data oasst.jsonl.gz --seq-len 1024
"""

import argparse
import contextlib
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from palm_rlhf.ops.cpu.threads import share_the_machine

share_the_machine()  # before torch is imported

import torch
import tyro
from sft_data import dialogues
from torch import Tensor

from palm_rlhf.cli import replace_unprintable_characters
from palm_rlhf.commands.run_folder import finish_chat_model, run_folder, say
from palm_rlhf.commands.sft_command import make_trainer
from palm_rlhf.commands.start_models import ChatModel, TemplateName, open_chat_model
from palm_rlhf.commands.training_data import Messages, fit_to_context, opening, read_records_for, split_held_out
from palm_rlhf.data.conversation import Template, encode_prompt, end_of_turn, has_tools
from palm_rlhf.data.stream_decoder import StreamDecoder
from palm_rlhf.data.templates import PRESETS
from palm_rlhf.data.tokenizer import ByteTokenizer, Tokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.token_ids import known_tokens
from palm_rlhf.policy.rollout import ResponseSampling, collect
from palm_rlhf.policy.sequences import spoken
from palm_rlhf.training.supervised import SCOPE
from palm_rlhf.training.supervised_config import SupervisedConfig


@dataclass(frozen=True)
class NewModel:
    """The size of a new byte-level model."""

    dim: int = 192  # Width of the residual stream.
    depth: int = 4  # Blocks.
    heads: int = 4  # Attention heads.
    dropout: float = 0.1  # Rate of dropout in training.


# The defaults take a few minutes on two CPU cores: those of a new model, and of one that exists, which gets adapters.
TRAINING = SupervisedConfig(batch_size=4, num_epochs=6, learning_rate=2e-3, min_lr_ratio=0.0, eval_every=100)
ADAPTING = replace(TRAINING, num_epochs=2, learning_rate=1e-3, lora_r=16, eval_every=10)


def fresh_model(fresh: NewModel, name: str) -> ChatModel:
    """Return a new model with tokens for the bytes and for the special tokens of a template."""
    tokenizer, template = ByteTokenizer(), PRESETS["default" if name == "auto" else name]
    tokenizer.add_special_tokens(template.special_tokens)
    return ChatModel(PaLM(num_tokens=tokenizer.num_tokens, **asdict(fresh)), tokenizer, template)


def measure(
    palm: PaLM, prompts: list[Tensor], tokenizer: Tokenizer, sampling: ResponseSampling
) -> tuple[float, list[str]]:
    """Return the rate of replies that end by themselves, and the replies, from the same random numbers each time."""
    rollout = collect(palm, prompts, sampling, generator=torch.Generator(palm.device).manual_seed(0))
    _, replies = spoken(rollout.sequences, tokenizer, sampling.eos_token)
    return 1 - float(rollout.truncated.double().mean()), replies


def converse(palm: PaLM, tokenizer: Tokenizer, template: Template, sampling: ResponseSampling, room: int) -> None:
    """Answer each line of standard input, token by token; the oldest turns are dropped beyond `room` tokens."""
    messages: Messages = []
    while line := (say("> ", end="") or sys.stdin.readline()):
        messages.append({"role": "user", "content": line.strip()})
        while len(prompt := encode_prompt(messages, tokenizer, template)) > room and len(messages) > 1:
            messages = messages[2:]
        decoder, reply = StreamDecoder(tokenizer), ""
        options = {"max_new_tokens": sampling.max_new_tokens, **sampling.options}
        for token in palm.stream(prompt.to(palm.device), **options):
            text = decoder.push(int(token))
            reply += text
            print(text, end="", flush=True)
        print(text := decoder.finish(), flush=True)
        messages.append({"role": "assistant", "content": reply + text})


def main(
    data: Path | None = None,
    model: str | None = None,
    output_dir: Path | None = None,
    resume: bool = False,
    template: TemplateName = "auto",
    chat: bool = False,
    held_out: float = 0.1,
    num_prompts: int = 64,
    seq_len: int = 512,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    fresh: NewModel = NewModel(),
    training: tyro.conf.OmitArgPrefixes[SupervisedConfig] = TRAINING,
) -> None:
    """Fine-tune a PaLM on conversations, then chat. The last line of standard output before the chat is JSON.

    Args:
        data: A file that `palm-rlhf data convert` reads; by default the dialogues of chatterbot-corpus.
        model: The folder of a model or of its run, a .gguf file, a hub id, or smollm2, a small chat model. Adapters are
            trained (--lora-r 16), with other settings than for a new model; without them (--lora-r 0) it needs a far
            lower learning rate, such as 2e-5. By default a new model is trained.
        output_dir: Folder of the model, tokenizer, template, checkpoints and metrics; by default a new one in runs/.
        resume: Continue from the newest checkpoint in output_dir; without output_dir, from the newest run in runs/. The
            measurement before the training is then of this checkpoint.
        template: The chat template; auto is the model's own, or default.
        chat: Chat at the end even if standard input is no terminal; each line is a message of the user.
        held_out: The share of conversations that is held out for measurements.
        num_prompts: Held-out prompts that the model answers before and after the training.
        seq_len: Length of a row in tokens; longer conversations are split between turns.
        max_new_tokens: Longest reply, in tokens; a reply of this length did not end by itself.
        temperature: Divides the logits in sampling; 0 always takes the likeliest token.
        fresh: Size of a new model.
        training: Training settings.
    """
    conversations = dialogues() if data is None else read_records_for(data, "sft")
    output_dir = run_folder("sft", output_dir, resume)
    torch.manual_seed(training.seed)
    chat_model = fresh_model(fresh, template) if model is None else open_chat_model(model, template)
    palm, tokenizer, form = chat_model
    train, valid = (
        fit_to_context(side, seq_len, chat_model) for side in split_held_out(conversations, held_out, training.seed)
    )
    trainer = make_trainer(chat_model, train, valid, seq_len, training, output_dir, resume)
    plain = [piece["messages"] for piece in valid if not has_tools(piece["messages"], piece.get("tools") or ())]
    questions = list({json.dumps(opening(messages)): opening(messages) for messages in plain}.values())
    questions = random.Random(training.seed).sample(questions, min(num_prompts, len(questions)))
    prompts = [encode_prompt(question, tokenizer, form) for question in questions]
    sampling = ResponseSampling(
        max_new_tokens,
        temperature=temperature,
        eos_token=end_of_turn(tokenizer, form),
        allowed_tokens=known_tokens(tokenizer, palm.num_tokens),
    )
    before, first_replies = measure(palm, prompts, tokenizer, sampling)
    say(f"{len(train)} conversations, {len(valid)} held out; {before:.0%} of {len(prompts)} replies end by themselves")
    for metrics in trainer.steps(progress_bar=True):
        if "valid_loss" in metrics:
            say(f"step {metrics['step']}: held-out loss {metrics['valid_loss']:.3f} nats per token")
    result = trainer.finish()
    if training.lora_r:
        palm.merge_finetune_params(SCOPE)
    if trainer.accelerator.is_main_process:
        after, replies = measure(palm, prompts, tokenizer, sampling)
        for question, *two in list(zip(questions, first_replies, replies, strict=True))[:5]:
            say("\n".join([f"--- {question[-1]['content']}", *(f"{w}: {t}" for w, t in zip(("before", "after"), two))]))
        say(f"{after:.0%} end by themselves now")
        rates = {"stop_rate_before": before, "stop_rate_after": after}
        finish_chat_model({**rates, **result}, output_dir, chat_model)
    if trainer.accelerator.is_main_process and (chat or sys.stdin.isatty()):
        with contextlib.suppress(KeyboardInterrupt):
            converse(palm, tokenizer, form, sampling, seq_len)


def command(args: Sequence[str]) -> None:
    """Run `main` with the arguments of a command line; a model that exists has other defaults than a new one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    has_model = parser.parse_known_args(args)[0].model is not None
    tyro.cli(partial(main, training=ADAPTING) if has_model else main, args=args)


if __name__ == "__main__":
    replace_unprintable_characters()
    try:
        command(sys.argv[1:])
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"sft.py: {error}")
