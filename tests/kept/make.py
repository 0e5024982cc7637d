"""Writes files as `test_kept.py` reads them, with the code of today: `python tests/kept/make.py FOLDER`.

Those in `files` were written with the code of commit 184c6db, and stay as they are: they show that later versions open
what earlier ones wrote. Where a later version adds to its checkpoints, this script writes a further folder beside them.
A run's folder is copied half-way; the same process then goes on to the end, and the metrics and weights that it comes
to are what the tests expect of a run that resumes from the copy.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from safetensors.torch import save_file

from palm_rlhf import RewardModel
from tests.kept import chats, stores
from tests.kept.runs import KEPT_STEP, NUM_STEPS, RUNS, checkpoint, outcome, palm_of, read, tensors, trained, trainer_of


def keep_run(name: str, kept: Path) -> None:
    """Keeps the first half of a run, and what its second half comes to."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        trainer = trainer_of(name, folder, seed=0)
        steps = trainer.steps()
        for _ in range(KEPT_STEP):
            next(steps)
        shutil.copytree(folder, kept / "run")
        expected = {"half_way": read(trained(name, checkpoint(folder, KEPT_STEP))), **outcome(name, trainer, folder)}
        weights = tensors(checkpoint(folder, NUM_STEPS))
        save_file({key: t for key, t in weights.items() if not key.startswith("optimizer")}, kept / "final.safetensors")
    write(kept / "expected.json", expected)


def keep_models(kept: Path) -> None:
    """Keeps a language model in both formats, one with adapters, and reward models, with their outputs."""
    plain = palm_of(0, kv_heads=2, qk_norm=True, rotary_theta=500.0, logit_scale=0.5)
    adapted = palm_of(1, xpos=True)
    adapted.add_finetune_params("style", 2)
    for parameter in adapted.finetune_parameters("style"):
        parameter.data.add_(0.1)
    scalar = RewardModel(palm_of(2), use_lora=True, lora_r=2)
    scalar.score_mean.fill_(0.25)
    scalar.score_std.fill_(2.0)
    binned = RewardModel(palm_of(3), num_binned_output=5, pooling="mean")
    models = {
        "palm": plain, "palm_with_adapters": adapted, "reward_model": scalar, "reward_model_binned": binned
    }  # fmt: skip
    for name, model in models.items():
        model.save_pretrained(kept / name)
    plain.save_pretrained(kept / "cohere", format="cohere")
    write(kept / "expected.json", {name: read(model) for name, model in {**models, "cohere": plain}.items()})


def keep_chats(kept: Path) -> None:
    """Keeps tokenizers with templates: bytes with our own, and words of Hugging Face with one in Jinja."""
    for name, (tokenizer, template) in chats.makers().items():
        tokenizer.save_pretrained(kept / name)
        template.save_pretrained(kept / name)
    write(kept / "expected.json", {name: chats.tokens_of(kept / name) for name in chats.makers()})


def write(path: Path, content: dict) -> None:
    """Writes JSON, a line for each value."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Writes all of it to a folder that must be new."""
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True)
    for name in RUNS:
        (folder / name).mkdir()
        keep_run(name, folder / name)
    keep_models(folder / "models")
    keep_chats(folder / "chats")
    (folder / "store").mkdir()
    os.chdir(folder / "store")
    stores.write()


if __name__ == "__main__":
    main()
