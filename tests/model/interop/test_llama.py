"""Folders of LLaMA and its kin: transformers and PaLM compute the same logits, whichever of the two wrote them."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from palm_rlhf.model.palm import PaLM

NUM_TOKENS = 31
TYPES = ("llama", "mistral", "qwen2", "qwen3")
SIZES = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-3,
    "rope_theta": 1000.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def transformer(model_type: str, seed: int = 1, **settings) -> nn.Module:
    """A model of transformers with weights of which none is like another, norms and biases included."""
    own = {"sliding_window": None} if model_type == "mistral" else {}
    values = SIZES | ({} if model_type == "qwen2" else {"head_dim": 6}) | own | settings
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.5 if "bias" in name else parameter.shape[-1] ** -0.5, generator=generator)
            if "norm" in name:
                parameter.div_(2).add_(1)
    return model


def tokens(seed: int = 0, length: int = 40) -> Tensor:
    return torch.randint(NUM_TOKENS, (3, length), generator=torch.Generator().manual_seed(seed))


def edit_config(folder: Path, remove: tuple[str, ...] = (), **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name in remove:
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@torch.no_grad()
def assert_same_logits(palm: PaLM, model: nn.Module) -> None:
    logits = model(tokens()).logits
    assert logits.dtype == torch.float32 and 0.1 < logits.std() < 10
    torch.testing.assert_close(palm.eval()(tokens()), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_folder_opens_as_a_palm_and_is_written_back(tmp_path, model_type):
    model = transformer(model_type)
    model.save_pretrained(tmp_path / "theirs")
    palm = PaLM.from_pretrained(tmp_path / "theirs")
    assert_same_logits(palm, model)
    palm.save_pretrained(tmp_path / "ours", format=model_type)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is type(model)
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())
