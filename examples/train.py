"""Trains a byte-level PaLM on text: enwik8 where it can be downloaded, or files of yours.

python examples/train.py --data notes/ --dim 512 --num-steps 5000
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from palm_rlhf.data.text import load_corpus
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.palm import PaLM
from palm_rlhf.training.config import LMConfig
from palm_rlhf.training.language_model import LanguageModelTrainer

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


def main(
    data: tuple[str, ...] = ("auto",),
    output_dir: Path | None = None,
    resume: bool = False,
    prompts: tuple[str, ...] = (),
    sample_every: int = 1000,
    sample_bytes: int = 300,
    temperature: float = 0.8,
    model: tyro.conf.OmitArgPrefixes[PaLMConfig] = MODEL,
    training: tyro.conf.OmitArgPrefixes[LMConfig] = TRAINING,
) -> None:
    """Trains a byte-level PaLM and samples from it; the last line on standard output is JSON.

    Args:
        data: Parts of the mixture: enwik8, python-docs, auto (the first of these that can be had), or a file, folder or
            glob; each may carry a weight, as in notes/:0.3.
        output_dir: Where the model, checkpoints, metrics and curves go; a new folder in runs/ by default.
        resume: Go on from the newest checkpoint in output_dir, if there is one.
        prompts: Texts to continue as samples; the beginning of the held-out text by default.
        sample_every: Steps between samples; they are shown at the end too.
        sample_bytes: Bytes of a sample.
        temperature: Divides the logits in sampling; 0 always takes the likeliest byte.
        model: The numbers of the model.
        training: How it is trained.
    """
    corpus = load_corpus(data, window=training.seq_len + 1)
    output_dir = output_dir or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    torch.manual_seed(training.seed)
    trainer = LanguageModelTrainer(
        PaLM(**asdict(model)),
        train_data=corpus.train,
        weights=corpus.weights,
        valid_data=corpus.valid,
        valid_bytes=corpus.valid_bytes,
        config=training,
        output_dir=output_dir,
        resume=resume,
    )
    palm, is_main = trainer.trained, trainer.accelerator.is_main_process

    def show(text: str) -> None:
        if is_main:
            tqdm.write(text, file=sys.stderr)

    def show_samples() -> None:
        generator = torch.Generator(palm.device).manual_seed(training.seed)
        for prompt in [text.encode() for text in prompts] or [corpus.valid[0][:64].tobytes()]:
            tokens = torch.tensor(list(prompt), device=palm.device)
            sample = palm.generate(
                prompt=tokens, max_new_tokens=sample_bytes, temperature=temperature, generator=generator
            )
            show(f"--- {(prompt + bytes(sample.tolist())).decode(errors='replace')}\n---")

    num_parameters = sum(parameter.numel() for parameter in palm.parameters())
    show(f"{corpus.note}\n{num_parameters / 1e6:.1f}M parameters, saved to {output_dir}")
    for metrics in trainer.steps(progress_bar=True):
        if "bits_per_byte" in metrics:
            show(f"step {metrics['step']}: {metrics['bits_per_byte']:.3f} bits per byte")
        if is_main and metrics["step"] % sample_every == 0:
            show_samples()
    result = trainer.finish()
    if is_main:
        palm.save_pretrained(output_dir / "model")
        show_samples()
        print(json.dumps({**result, "model": str(output_dir / "model")}))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
