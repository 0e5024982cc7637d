"""The config.json of well-known models, smaller, as transformers 4 wrote them and as transformers 5 does."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from palm_rlhf.model.palm import PaLM

SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 90}
SIZES |= {"num_attention_heads": 4, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}
QWEN = {"attention_dropout": 0.0, "bos_token_id": 80, "eos_token_id": 81, "use_sliding_window": False}
LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
MODELS = {
    # LLaMA 1 and Vicuna mention neither key heads nor the rotary
    "LLaMA": LLAMA | {"max_position_embeddings": 2048, "max_sequence_length": 2048, "rms_norm_eps": 1e-6},
    "Yi": LLAMA
    | {"max_position_embeddings": 4096, "num_key_value_heads": 1, "pretraining_tp": 1, "rms_norm_eps": 1e-5}
    | {"rope_scaling": None, "rope_theta": 5000000.0, "tie_word_embeddings": False},
    "Llama 3.2 1B": LLAMA
    | {"attention_bias": False, "mlp_bias": False, "head_dim": 8, "max_position_embeddings": 131072}
    | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}}
    | {"rope_theta": 500000.0, "tie_word_embeddings": True, "eos_token_id": [2, 3, 4]},
    "DeepSeek Coder": LLAMA
    | {"max_position_embeddings": 16384, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}
    | {"rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000, "tie_word_embeddings": False},
    "SmolLM2": LLAMA
    | {"is_llama_config": True, "max_position_embeddings": 8192, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    | {"rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True}
    | {"pad_token_id": 2, "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
    "Mistral Nemo": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "head_dim": 12}
    | {"max_position_embeddings": 131072, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0}
    | {"sliding_window": None, "tie_word_embeddings": False, "attention_dropout": 0.0},
    "Qwen2.5 with YaRN": QWEN
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 32768}
    | {"max_window_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
    | {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}}
    | {"sliding_window": 131072, "tie_word_embeddings": True},
    "Qwen3 0.6B": QWEN
    | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 16}
    | {"max_position_embeddings": 40960, "max_window_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
    | {"rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True},
    "Command R+": {"architectures": ["CohereForCausalLM"], "model_type": "cohere", "attention_bias": False}
    | {"layer_norm_eps": 1e-5, "logit_scale": 0.8333, "max_position_embeddings": 8192, "model_max_length": 131072}
    | {"num_key_value_heads": 2, "pad_token_id": 0, "rope_theta": 75000000.0, "use_qk_norm": True},
}
GREEDY = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_it_does_in_transformers(tmp_path, name):
    config = {**SIZES, **MODELS[name], "torch_dtype": "float32", "transformers_version": "4.40.0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    generator = torch.Generator().manual_seed(1)
    for tensor, parameter in model.named_parameters():
        parameter.normal_(0, 0.3 if "bias" in tensor else parameter.shape[-1] ** -0.5, generator=generator)
        if "norm" in tensor:
            parameter.div_(2).add_(1)
    tokens = torch.randint(SIZES["vocab_size"], (2, 50), generator=generator)
    logits, prompt = model(tokens).logits, tokens[:, :5]
    greedy = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)[:, 5:]

    model.save_pretrained(tmp_path, max_shard_size="10KB")
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written and "dtype" in written  # the form of transformers 5
    for form in (written, config):
        (tmp_path / "config.json").write_text(json.dumps(form))
        palm = PaLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(palm(tokens), logits, rtol=0, atol=1e-5)
        assert palm.config.max_seq_len == config.get("model_max_length", config["max_position_embeddings"])
    assert torch.equal(palm.generate(None, prompt, max_new_tokens=16, temperature=0.0), greedy)
    palm.save_pretrained(tmp_path / "again", format="hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(again(tokens).logits, logits, rtol=0, atol=1e-5)
