"""The command ``palm-rlhf train``: a language model on text."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import tyro
from beartype import beartype
from tyro.conf import arg

from palm_rlhf.commands.run_folder import finish, quoted, run_folder, save_model, say
from palm_rlhf.commands.start_models import open_tokenizer
from palm_rlhf.data.conversation import Template
from palm_rlhf.data.templates import load_template
from palm_rlhf.data.text import load_corpus
from palm_rlhf.data.tokenizer import NUM_BYTES, ByteTokenizer, Tokenizer, load_tokenizer
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.token_ids import known_tokens
from palm_rlhf.model.weights_folder import local_folder
from palm_rlhf.training.language_model import LanguageModelTrainer
from palm_rlhf.training.language_model_config import LMConfig

# The defaults, for about ten minutes on two CPU cores that do nothing else.
MODEL = PaLMConfig(num_tokens=256, dim=256, depth=6, heads=4, ff_mult=2)
TRAINING = LMConfig(
    batch_size=16,
    seq_len=256,
    num_steps=1300,
    optimizer="muon",
    learning_rate=1e-2,
    min_lr_ratio=0.0,
    weight_decay=1.0,  # small texts are seen many times: with 0.1 they are learnt by heart
    warmup_steps=50,
    eval_every=500,
    eval_tokens=20_000,
    eval_context=192,
    save_every=500,
)
PROMPT_LENGTH = 64  # characters of the held-out text that a sample goes on from
LETTER = r"[^\W\d_]"  # of any script
READABLE = re.compile(rf"\b{LETTER}(?:{LETTER}|[ ,.;:'’()-]){{10,}}")


@beartype
def train(
    data: Annotated[tuple[str, ...], arg(metavar="TEXT ...")] = ("auto",),
    model: Annotated[str | None, arg(metavar="MODEL")] = None,
    tokenizer: Annotated[str | None, arg(metavar="FOLDER")] = None,
    output_dir: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    resume: bool = False,
    prompts: Annotated[tuple[str, ...], arg(metavar="TEXT ...", help_behavior_hint="(default: held-out text)")] = (),
    sample_every: int = 1000,
    sample_bytes: int = 300,
    temperature: float = 0.8,
    fresh: tyro.conf.OmitArgPrefixes[PaLMConfig] = MODEL,
    training: tyro.conf.OmitArgPrefixes[LMConfig] = TRAINING,
) -> None:
    """Train a language model on text, from nothing or from a model that there is, and sample from it.

    The last line on standard output is JSON: bits_per_byte, steps, seconds, output_dir and model.

    Args:
        data: Parts of the mixture: enwik8, python-docs, auto (the first of these that can be had), or a file, folder or
            glob; each may carry a weight, as in notes/:0.3.
        model: Go on from this model, with its tokenizer: its folder, that of a run, or a hub id. Such models take a
            lower learning rate. By default a fresh one.
        tokenizer: The tokenizer of a fresh model: a folder with a tokenizer.json, or a hub id; bytes by default.
        output_dir: Where the model, checkpoints, metrics and curves go; a new folder in runs/ by default.
        resume: Go on from the newest checkpoint in output_dir; without that, of the newest run in runs/.
        prompts: Texts to continue as samples; by default the first words of the held-out text that read well.
        sample_every: Steps between samples; they are shown at the end too.
        sample_bytes: Tokens of a sample: bytes, unless there is a tokenizer.
        temperature: Divides the logits in sampling; 0 always takes the likeliest token.
        fresh: The numbers of a fresh model.
        training: How it is trained.
    """
    output_dir = run_folder("train", output_dir, resume)
    torch.manual_seed(training.seed)
    palm, known, template = _start(model, tokenizer, fresh)
    is_bytes = isinstance(known, ByteTokenizer)
    tokens = {} if is_bytes else {"tokenizer": known, "eos_token": known.eos_token}
    corpus = load_corpus(data, window=training.seq_len + 1, **tokens)
    trainer = LanguageModelTrainer(
        palm,
        train_data=corpus.train,
        weights=corpus.weights,
        valid_data=corpus.valid,
        valid_bytes=corpus.valid_bytes,
        config=training,
        output_dir=output_dir,
        resume=resume,
    )
    palm, is_main = trainer.trained, trainer.accelerator.is_main_process
    show = say if is_main else lambda text: None
    starts = list(prompts) or [readable_start(known.decode(corpus.valid[0][: 1 << 16].tolist()))]

    def show_samples() -> None:
        show_continuations(palm, known, starts, sample_bytes, temperature, training.seed, show)

    num_parameters = sum(parameter.numel() for parameter in palm.parameters())
    show(f"{corpus.note}\n{num_parameters / 1e6:.1f}M parameters, saved to {output_dir}")
    for metrics in trainer.steps(progress_bar=True):
        if "bits_per_byte" in metrics:
            show(f"step {metrics['step']}: {metrics['bits_per_byte']:.3f} bits per byte")
        if is_main and metrics["step"] % sample_every == 0:
            show_samples()
    result = trainer.finish()
    if is_main:
        # A model of bytes alone has no room for the special tokens of their tokenizer, and opens without it.
        save_model(output_dir, palm, known if known.num_tokens <= palm.num_tokens else None, template)
        show_samples()
        finish(
            result,
            output_dir,
            [
                ("continue a text", f"palm-rlhf generate {quoted(output_dir)} --prompt {quoted(starts[0])}"),
                ("fine-tune it", f"palm-rlhf sft CONVERSATIONS --model {quoted(output_dir)}"),
            ],
        )


def _start(model: str | None, tokenizer: str | None, fresh: PaLMConfig) -> tuple[PaLM, Tokenizer, Template | None]:
    """The model to train, its tokenizer, and the template that it is to keep."""
    if model is not None and tokenizer is not None:
        raise ValueError(f"got --model {model} and --tokenizer {tokenizer}, expected one: a model keeps its tokenizer")
    if model is None and tokenizer is None:
        if fresh.num_tokens < NUM_BYTES:
            raise ValueError(f"num_tokens is {fresh.num_tokens}, expected at least {NUM_BYTES}: the tokens are bytes")
        return PaLM.from_config(fresh), ByteTokenizer(), None
    if model is None:
        known = load_tokenizer(tokenizer if Path(tokenizer).is_file() else local_folder(tokenizer))
        return PaLM(**{**asdict(fresh), "num_tokens": known.num_tokens}), known, None
    folder = local_folder(model)
    palm = PaLM.from_pretrained(folder)
    try:
        template = load_template(folder)
    except FileNotFoundError:
        template = None
    known = ByteTokenizer() if palm.num_tokens == NUM_BYTES else open_tokenizer(folder, palm)
    return palm, known, template


@beartype
def readable_start(text: str) -> str:
    """Words that follow each other in a text without markup between, as far as `PROMPT_LENGTH`; else its beginning."""
    passages = (found.group()[:PROMPT_LENGTH] for found in READABLE.finditer(text))
    start = max(passages, key=lambda words: (len(words), words[0].isupper()), default=text[:PROMPT_LENGTH])
    words, blank, _ = start.rpartition(" ")
    return words + blank if words else start


def show_continuations(
    palm: PaLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    num_tokens: int,
    temperature: float,
    seed: int,
    show: Callable[[str], None],
) -> None:
    """Shows each prompt with what a model makes of it, from the same random numbers each time."""
    generator = torch.Generator(palm.device).manual_seed(seed)
    for prompt in prompts:
        tokens = torch.tensor(tokenizer.encode(prompt), device=palm.device)
        sample = palm.generate(
            prompt=tokens,
            max_new_tokens=num_tokens,
            temperature=temperature,
            generator=generator,
            allowed_tokens=known_tokens(tokenizer, palm.num_tokens),
        )
        show(f"--- {prompt}{tokenizer.decode(sample.tolist())}\n---")
