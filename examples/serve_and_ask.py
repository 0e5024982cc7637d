"""Serve a PaLM in OpenAI's protocol, ask it with OpenAI's client, with and without streaming, and stop.

python examples/serve_and_ask.py                            # a small model is trained for a few seconds
python examples/serve_and_ask.py --checkpoint runs/sft/model --ask-for "What is a neural network?"
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from palm_rlhf.ops.cpu.threads import share_the_machine

share_the_machine()  # before torch is imported

import torch
import tyro
from tqdm import tqdm

from palm_rlhf.cli import replace_unprintable_characters
from palm_rlhf.data.conversation import encode
from palm_rlhf.data.templates import PRESETS
from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.engine import Engine
from palm_rlhf.serving.http.app import create_app
from palm_rlhf.serving.http.fastapi_import import fastapi_module
from palm_rlhf.serving.http.run_server import running
from palm_rlhf.serving.served_model import load

DIALOGUES = [
    ("Hello", "Hello! What would you like to know?"),
    ("What are you?", "A very small language model: I know a handful of sentences by heart."),
    ("Who trained you?", "You did, a few seconds ago."),
    ("What is the capital of France?", "Paris."),
]


def require_packages() -> None:
    """Raise ImportError before the training if a package for the end is missing."""
    fastapi_module()
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}; the client that asks comes with: pip install openai") from error


def train(folder: Path, num_steps: int) -> None:
    """Train a small model to memorise some dialogues, and save it."""
    torch.manual_seed(0)
    tokenizer, template = ByteTokenizer(), PRESETS["default"]
    palm = PaLM(num_tokens=tokenizer.num_tokens, dim=64, depth=2, heads=4, dim_head=16, max_seq_len=1024)
    examples = [
        encode([{"role": "user", "content": question}, {"role": "assistant", "content": reply}], tokenizer, template)
        for question, reply in DIALOGUES
    ]
    tokens, loss_mask = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        for rows in ([example.tokens.long() for example in examples], [example.weights > 0 for example in examples])
    )
    optimizer = torch.optim.AdamW(palm.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for _ in tqdm(range(num_steps), desc="train"):
        optimizer.zero_grad()
        palm(tokens, return_loss=True, loss_mask=loss_mask).backward()
        optimizer.step()
    for part in (palm, tokenizer, template):
        part.save_pretrained(folder)


def ask(url: str, question: str, max_tokens: int | None) -> dict:
    """Ask for the whole reply and for a stream, and print both."""
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        (model,) = client.models.list().data
        messages = [{"role": "user", "content": question}]
        options = {"model": model.id, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        reply = client.chat.completions.create(**options)
        print(f"> {question}\n{reply.choices[0].message.content}\n")

        print(f"> {question}   (as it comes)")
        started, pieces = time.perf_counter(), []
        for chunk in client.chat.completions.create(**options, stream=True):
            pieces.append(chunk.choices[0].delta.content or "")
            print(pieces[-1], end="", flush=True)
        seconds = time.perf_counter() - started
        print("\n")
    same = "".join(pieces) == reply.choices[0].message.content
    return {"reply": "".join(pieces), "same": same, "tokens": reply.usage.completion_tokens, "stream_seconds": seconds}


def main(
    checkpoint: str | None = None, ask_for: str = "What are you?", max_tokens: int | None = None, num_steps: int = 150
) -> None:
    """Serve a model, ask it, and stop; the last line is JSON.

    Args:
        checkpoint: The folder of a model with its tokenizer and template, or of its run, or a hub id; by default a
            small model is trained.
        ask_for: The question.
        max_tokens: Longest reply, in tokens; by default the rest of the context.
        num_steps: Steps of the training.
    """
    require_packages()
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint is None:
            checkpoint = str(Path(folder) / "parrot")
            train(Path(checkpoint), num_steps)
        model = load(checkpoint)
    with Engine(model.palm, model.tokenizer) as engine, running(create_app(model, engine)) as url:
        print(f"{model.name} answers at {url}\n")
        print(json.dumps(ask(url, ask_for, max_tokens)))


if __name__ == "__main__":
    replace_unprintable_characters()
    try:
        tyro.cli(main)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"serve_and_ask.py: {error}")
