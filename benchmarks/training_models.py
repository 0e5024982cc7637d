"""Models of one shape and one training step of each: ours, its trainer's, and those of two other packages."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from palm_rlhf import PaLM
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.interop.cohere import to_cohere_config, to_cohere_tensors
from palm_rlhf.model.interop.llama import model_type_of, to_llama_config, to_llama_tensors
from palm_rlhf.ops.rotary_scaling import RotaryScaling
from palm_rlhf.training import LanguageModelTrainer, LMConfig

Step = Callable[[], object]


class Size(NamedTuple):
    """A model, and the tokens of a step."""

    config: PaLMConfig
    batch: int
    seq_len: int


LLAMA = {"block": "serial", "norm": "rms", "logit_scale": 1.0}
SIZES = {
    "139M": Size(PaLMConfig(num_tokens=50304, dim=768, depth=12, heads=12), 16, 1024),
    "1B": Size(PaLMConfig(num_tokens=50304, dim=2048, depth=16, heads=16, dim_head=128), 8, 2048),
    "SmolLM2 135M": Size(  # by its config.json, as that of LLaMA
        PaLMConfig(
            num_tokens=49152, dim=576, depth=30, heads=9, kv_heads=3, ff_inner_dim=1536, rotary_theta=1e5, **LLAMA
        ),
        16,
        1024,
    ),
    "LLaMA 3.2 1B": Size(
        PaLMConfig(
            num_tokens=128256,
            dim=2048,
            depth=16,
            heads=32,
            kv_heads=8,
            ff_inner_dim=8192,
            rotary_theta=5e5,
            rotary_scaling=RotaryScaling("llama3", 32.0, 8192),
            **LLAMA,
        ),
        4,
        2048,
    ),
}


def make_step(model: nn.Module, tokens: Tensor, bfloat16: bool, loss_of: Callable | None = None) -> Step:
    """Forward, backward, clipping and AdamW, as both projects' training scripts do them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bfloat16):
            loss = model(tokens, return_loss=True) if loss_of is None else loss_of(model, tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_trainer_step(size: Size, compiled: bool) -> Step:
    """A step of our trainer, with its data, its schedule and its metrics, in bfloat16 autocast."""
    tokens = torch.randint(size.config.num_tokens, (size.batch * size.seq_len * 4 + 1,))
    config = LMConfig(
        batch_size=size.batch,
        seq_len=size.seq_len,
        eval_context=0,
        num_steps=1_000_000,
        learning_rate=1e-4,
        precision="bf16",
        compile=compiled,
        plot=False,
    )
    trainer = LanguageModelTrainer(PaLM.from_config(size.config), train_data=tokens, config=config)
    steps = trainer.steps()
    return lambda: next(steps)


def make_hugging_face(config: PaLMConfig, palm: PaLM | None = None) -> nn.Module:
    """A model of transformers of the same shape, Cohere or LLaMA's kin, with the weights of `palm`, if given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.block == "parallel":
        values, tensors = to_cohere_config(config, scopes=[], dtype=torch.float32), to_cohere_tensors
    else:
        kind = model_type_of(config)
        values, tensors = to_llama_config(config, scopes=[], dtype=torch.float32, model_type=kind), to_llama_tensors
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    if palm is not None:
        model.load_state_dict(tensors(config, palm.state_dict()), strict=False)
    return model


def name_of_transformers(config: PaLMConfig) -> str:
    """The name of the rows of transformers."""
    return f"transformers {'Cohere' if config.block == 'parallel' else 'LLaMA'}"


def hugging_face_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The loss of a model of transformers, which reads the last token too, so that all models read as many."""
    return model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss


def make_theirs(config: PaLMConfig) -> nn.Module:
    """A model of palm-rlhf-pytorch of the same shape; its heads share one key head, as PaLM's do."""
    from palm_rlhf_pytorch import PaLM as TheirPaLM

    warnings.filterwarnings("ignore", category=FutureWarning)  # its use of torch.backends.cuda.sdp_kernel
    return TheirPaLM(
        num_tokens=config.num_tokens,
        dim=config.dim,
        depth=config.depth,
        heads=config.heads,
        dim_head=config.dim_head,
        flash_attn=True,
    )


def rows(size: Size, device: str) -> dict[str, Callable[[], Step]]:
    """What a GPU is timed on, by name: functions that make a step, so that one model at a time is in memory."""

    def of_model(make: Callable[[PaLMConfig], nn.Module], compiled: bool, loss_of: Callable | None = None) -> Step:
        model = make(size.config).to(device)
        tokens = torch.randint(size.config.num_tokens, (size.batch, size.seq_len + 1), device=device)
        # by `compile` of the module, which returns its own outputs and keeps its methods
        if compiled:
            model.compile()
        return make_step(model, tokens, bfloat16=True, loss_of=loss_of)

    transformers = name_of_transformers(size.config)
    return {
        "palm-rlhf": lambda: of_model(PaLM.from_config, False),
        "palm-rlhf, compiled": lambda: of_model(PaLM.from_config, True),
        "palm-rlhf, trainer": lambda: make_trainer_step(size, compiled=False),
        "palm-rlhf, trainer, compiled": lambda: make_trainer_step(size, compiled=True),
        transformers: lambda: of_model(make_hugging_face, False, hugging_face_loss),
        f"{transformers}, compiled": lambda: of_model(make_hugging_face, True, hugging_face_loss),
        "palm-rlhf-pytorch": lambda: of_model(make_theirs, False),
    }


def parity_errors(config: PaLMConfig) -> dict[str, float]:
    """The largest difference of our logits from each package's that is installed, in float32 on the CPU."""
    small, found = dataclasses.replace(config, depth=2), {}
    tokens = torch.randint(config.num_tokens, (1, 64))
    with torch.no_grad():
        palm = PaLM.from_config(small).eval()
        try:
            theirs = make_hugging_face(small, palm).eval()
            found[name_of_transformers(config)] = difference(palm(tokens), theirs(tokens).logits)
        except ImportError:
            pass
        if config.block == "serial":
            return found  # which the other package has not
        try:
            theirs = make_theirs(small).eval()
            ours = PaLM.from_palm_rlhf_pytorch(theirs.state_dict()).eval()
            found["palm-rlhf-pytorch"] = difference(ours(tokens), theirs(tokens))
        except ImportError:
            pass
    return found


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors."""
    return float((one - other).abs().max())
