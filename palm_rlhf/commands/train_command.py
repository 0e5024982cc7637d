"""The command ``palm-rlhf train``: train a language model on text."""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple, cast

import torch
import tyro
from beartype import beartype
from torch import Tensor
from tyro.conf import arg

from palm_rlhf.commands.run_folder import finish, quoted, run_folder, save_model, say
from palm_rlhf.commands.start_models import open_tokenizer
from palm_rlhf.data.conversation import Template
from palm_rlhf.data.templates import load_template
from palm_rlhf.data.text import load_corpus
from palm_rlhf.data.tokenizer import NUM_BYTES, ByteTokenizer, Tokenizer, load_tokenizer
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.local_model import local_model
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.token_ids import known_tokens
from palm_rlhf.training.language_model import LanguageModelTrainer
from palm_rlhf.training.language_model_config import LMConfig


class Defaults(NamedTuple):
    """A new model and its training, where no option says otherwise."""

    model: PaLMConfig
    training: LMConfig


# About ten minutes on two idle CPU cores.
ON_CPU = Defaults(
    PaLMConfig(num_tokens=256, dim=256, depth=6, heads=4, ff_mult=2),
    LMConfig(
        batch_size=16,
        seq_len=256,
        num_steps=1300,
        optimizer="muon",
        learning_rate=1e-2,
        min_lr_ratio=0.0,
        weight_decay=1.0,  # small texts are read many times: with 0.1 the model overfits
        warmup_steps=50,
        eval_every=500,
        eval_tokens=20_000,
        eval_context=192,
        save_every=500,
    ),
)
# 100M parameters that see 330 MB of text, at the learning rate of a GPT-3 of this size (Brown et al. 2020, table 2.1).
ON_GPU = Defaults(
    PaLMConfig(num_tokens=256, dim=768, depth=12, heads=12),
    LMConfig(
        batch_size=32,
        seq_len=1024,
        num_steps=10_000,
        learning_rate=6e-4,
        warmup_steps=500,
        eval_every=1000,
        eval_tokens=1_000_000,
        eval_context=512,
        save_every=1000,
    ),
)


@beartype
def defaults_of(device_type: str) -> Defaults:
    """Return the defaults for a type of device: those of a GPU for "cuda", else those of a CPU."""
    return ON_GPU if device_type == "cuda" else ON_CPU


HERE = defaults_of("cuda" if torch.cuda.is_available() else "cpu")
PROMPT_LENGTH = 64  # characters of the held-out text in the prompt of a sample
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
    fresh: tyro.conf.OmitArgPrefixes[PaLMConfig] = HERE.model,
    training: tyro.conf.OmitArgPrefixes[LMConfig] = HERE.training,
) -> None:
    """Train a language model on text, a new one or an existing one, and sample from it.

    The defaults are those of the device. On a CPU a model of 3.4M parameters takes 1,300 steps of 16 x 256 bytes, about
    ten minutes on two cores. On a GPU (CUDA) a model of 100M parameters, of width 768 and depth 12, takes 10,000 steps
    of 32 x 1,024 bytes. The defaults below are the ones for this machine.

    The last line on standard output is JSON: bits_per_byte, steps, seconds, output_dir and model.

    Args:
        data: Parts of the mixture: enwik8, python-docs, auto (the first of these that is available), or a file, folder
            or glob; each may have a weight, as in notes/:0.3.
        model: Continue from this model, with its tokenizer: its folder or .gguf file, the folder of a run, a hub id, or
            smollm2. Such models need a lower learning rate. By default a new model is trained.
        tokenizer: The tokenizer of a new model: a folder with a tokenizer.json, a .gguf file, a hub id, or smollm2;
            bytes by default.
        output_dir: Folder of the model, checkpoints, metrics and curves; by default a new one in runs/.
        resume: Continue from the newest checkpoint in output_dir; without output_dir, from the newest run in runs/.
        prompts: Prompts of the samples; by default a readable passage of the held-out text.
        sample_every: Steps between samples; samples are shown at the end too.
        sample_bytes: Length of a sample in tokens, which are bytes without a tokenizer.
        temperature: Divides the logits in sampling; 0 always takes the likeliest token.
        fresh: Settings of a new model.
        training: Training settings.
    """
    output_dir = run_folder("train", output_dir, resume)
    torch.manual_seed(training.seed)
    palm, known, template = _start(model, tokenizer, fresh)
    window = training.seq_len + 1
    if isinstance(known, ByteTokenizer):
        corpus = load_corpus(data, window=window)
    else:
        corpus = load_corpus(data, window=window, tokenizer=known, eos_token=known.eos_token)
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
        # A model of 256 bytes has no embeddings for the special tokens of ByteTokenizer, and opens without a tokenizer.
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
    """Return the model to train, its tokenizer, and its chat template if it has one."""
    if model is not None and tokenizer is not None:
        raise ValueError(f"got --model {model} and --tokenizer {tokenizer}, expected one: a model keeps its tokenizer")
    if tokenizer is not None:
        known = load_tokenizer(tokenizer if Path(tokenizer).is_file() else local_model(tokenizer))
        return PaLM.from_config(replace(fresh, num_tokens=known.num_tokens)), known, None
    if model is None:
        if fresh.num_tokens < NUM_BYTES:
            raise ValueError(f"got num_tokens {fresh.num_tokens}, expected at least {NUM_BYTES}: the tokens are bytes")
        return PaLM.from_config(fresh), ByteTokenizer(), None
    folder = local_model(model)
    palm = PaLM.from_pretrained(folder)
    template = None
    with contextlib.suppress(FileNotFoundError):
        template = load_template(folder)
    known = ByteTokenizer() if palm.num_tokens == NUM_BYTES else open_tokenizer(folder, palm)
    return palm, known, template


@beartype
def readable_start(text: str) -> str:
    """Return a passage of words without markup, of at most `PROMPT_LENGTH` characters; else the start of the text."""
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
    """Show each prompt with a sampled continuation, from the same random numbers each time."""
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
        show(f"--- {prompt}{tokenizer.decode(cast(Tensor, sample).tolist())}\n---")
