"""Generation by the serial block of LLaMA's kin, beside transformers and llama.cpp, with the same weights, on a CPU.

python benchmarks/serial_generation.py                   # random weights in the shape of SmolLM2-135M
python benchmarks/serial_generation.py --model smollm2   # or a folder, a GGUF file or a hub id of such a model

It needs the extras palm-rlhf[hf,gguf]. llama.cpp takes part where llama-cpp-python is installed, with a GGUF file of
float16. All take the likeliest tokens, which are compared first: in float32, transformers and PaLM have the same ones;
those of llama.cpp are the likeliest by a PaLM with the weights of its file, or hardly less likely.
"""

import copy
import itertools
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import tyro
from side_by_side import alternate, report, speedup
from torch import nn
from training_models import difference, make_hugging_face

from palm_rlhf import PaLM
from palm_rlhf.model.interop.gguf_writer import write_gguf
from palm_rlhf.model.local_model import local_model

SMOLLM2 = {"num_tokens": 49152, "dim": 576, "depth": 30, "heads": 9, "kv_heads": 3, "ff_inner_dim": 1536}
LLAMA = {"block": "serial", "norm": "rms", "logit_scale": 1.0, "rotary_theta": 100_000.0}
MAX_DIFFERENCE = 1e-4  # of logits in float32, in parts of their deviation
LESS_LIKELY = 0.05  # of the logit of llama.cpp's token, which rounds activations too, in parts of their deviation
Generate = Callable[[int], list[int]]  # so many tokens after the prompt


def model_of(source: str | None, depth: int, dim: int, vocabulary: int) -> PaLM:
    """Return a model in float32: an opened one, or one with random weights that does not repeat itself."""
    if source is not None:
        return PaLM.from_pretrained(local_model(source), dtype=torch.float32).eval()
    sizes = {"depth": depth, "dim": dim, "ff_inner_dim": dim * 8 // 3, "heads": dim // 64, "num_tokens": vocabulary}
    palm = PaLM(**{**SMOLLM2, **LLAMA, **sizes})
    with torch.no_grad():
        for layer in palm.layers:
            layer.attn_out.weight.mul_(16)
            layer.ff_out.weight.mul_(16)
    return palm.eval()


def by_palm(palm: PaLM, prompt: list[int]) -> Generate:
    """Return the likeliest tokens by `PaLM.generate`."""
    tokens = torch.tensor(prompt)
    return lambda count: palm.generate(prompt=tokens, max_new_tokens=count, temperature=0).tolist()


def by_transformers(model: nn.Module, prompt: list[int]) -> Generate:
    """Return the likeliest tokens by `generate` of transformers."""
    tokens = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "pad_token_id": 0}

    def generate(count: int) -> list[int]:
        return model.generate(tokens, min_new_tokens=count, max_new_tokens=count, **options)[0, len(prompt) :].tolist()

    return generate


def by_llama_cpp(path: Path, prompt: list[int], context: int) -> Generate:
    """Return the likeliest tokens by llama.cpp, with as many threads as PyTorch has."""
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    model = Llama(str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(count: int) -> list[int]:
        model.reset()  # it would know the prompt from the last time
        return list(itertools.islice(model.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0), count))

    return generate


@torch.no_grad()
def check_transformers(palm: PaLM, model: nn.Module, prompt: list[int], count: int) -> None:
    """Raise AssertionError unless transformers computes the same logits of a prompt, and says the same after it."""
    tokens = torch.tensor([prompt])
    logits = palm(tokens)
    apart = difference(model(tokens).logits, logits) / float(logits.std())
    assert apart < MAX_DIFFERENCE, f"the logits of transformers differ by {apart:.1e} of their deviation"
    said = by_palm(palm, prompt)(count)
    assert said == by_transformers(model, prompt)(count), "the tokens of transformers differ"
    print(f"parity: transformers has the same logits, and says the same {count} tokens, {len(set(said))} distinct ones")


@torch.no_grad()
def check_llama_cpp(path: Path, said: list[int], prompt: list[int]) -> None:
    """Raise AssertionError unless each token of llama.cpp is the likeliest by its file, or hardly less likely."""
    palm = PaLM.from_pretrained(path, dtype=torch.float32).eval()
    logits = palm(torch.tensor([prompt + said]))[0, len(prompt) - 1 : -1]
    chosen = logits.gather(-1, torch.tensor(said)[:, None])[:, 0]
    less = float(((logits.amax(-1) - chosen) / logits.std(-1)).max())
    assert less < LESS_LIKELY, f"llama.cpp says tokens that are less likely, by {less:.2f} of the logits' deviation"
    same = sum(a == b for a, b in zip(said, by_palm(palm, prompt)(len(said)), strict=True))
    print(f"parity: llama.cpp says likeliest tokens, {same} of {len(said)} as we do")


def vocabulary_of(source: str | None, palm: PaLM) -> dict:
    """Return the metadata by which llama.cpp knows the tokens of a model; for random weights they have no text."""
    if source is None:
        return {"tokenizer.ggml.model": "none"}
    from palm_rlhf.data.tokenizer import load_tokenizer
    from palm_rlhf.data.tokenizer_gguf_writer import gguf_metadata

    return gguf_metadata(load_tokenizer(local_model(source)), None, palm.num_tokens)


def main(
    model: str | None = None,
    prompt_len: int = 128,
    num_tokens: int = 64,
    rounds: int = 5,
    depth: int = 30,
    dim: int = 576,
    vocabulary: int = 49152,
) -> None:
    """Time the likeliest tokens after a prompt of random ones, one after the other.

    Args:
        model: A model to open. By default the weights are random.
        prompt_len: Tokens of the prompt.
        num_tokens: Tokens after it.
        rounds: Timed rounds.
        depth: Blocks of a random model.
        dim: Width of a random model, a multiple of 192: heads have 64, and three of queries share one of keys.
        vocabulary: Tokens that a random model knows.
    """
    torch.manual_seed(0)
    palm = model_of(model, depth, dim, vocabulary)
    if palm.config.block != "serial":
        sys.exit("serial_generation.py: expected a model with a serial block; generation.py times PaLM's own")
    prompt = torch.randint(palm.num_tokens, (prompt_len,)).tolist()
    theirs = make_hugging_face(palm.config, palm).eval()
    check_transformers(palm, theirs, prompt, min(num_tokens, 32))
    runs = {
        "palm-rlhf, float32": by_palm(palm, prompt),
        "transformers, float32": by_transformers(theirs, prompt),
        "palm-rlhf, bfloat16": by_palm(copy.deepcopy(palm).to(torch.bfloat16), prompt),
        "transformers, bfloat16": by_transformers(make_hugging_face(palm.config, palm).bfloat16().eval(), prompt),
    }
    with tempfile.TemporaryDirectory() as folder:
        if find_spec("llama_cpp") is None:
            print("left out: llama.cpp, for llama-cpp-python is not installed")
        else:
            path = Path(folder, "model.gguf")
            write_gguf(palm, path, type="f16", name="benchmark", tokenizer=vocabulary_of(model, palm))
            runs["llama.cpp, float16"] = by_llama_cpp(path, prompt, prompt_len + num_tokens)
            check_llama_cpp(path, runs["llama.cpp, float16"](min(num_tokens, 32)), prompt)
        seconds = alternate({name: lambda run=run: run(num_tokens) for name, run in runs.items()}, rounds=rounds)
    rates = {name: num_tokens / min(values) for name, values in seconds.items()}
    print("\n".join(f"{name:44}{rate:10.1f} tokens/s at best" for name, rate in rates.items()), "\n")
    pairs = [("float32", "transformers, float32"), ("bfloat16", "transformers, bfloat16")]
    pairs += [(dtype, "llama.cpp, float16") for dtype in ("float32", "bfloat16") if "llama.cpp, float16" in seconds]
    ours = {dtype: seconds[f"palm-rlhf, {dtype}"] for dtype in ("float32", "bfloat16")}
    ratios = {f"{dtype} than {other}": speedup(ours[dtype], seconds[other]) for dtype, other in pairs}
    title = f"{num_tokens} tokens after {prompt_len}, {model or f'serial block, dim {palm.config.dim}, depth {depth}'}"
    report(title, seconds, ratios, "transformers", "llama-cpp-python")


if __name__ == "__main__":
    tyro.cli(main)
