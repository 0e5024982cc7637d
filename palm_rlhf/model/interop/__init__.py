"""Weights of other libraries: folders of Hugging Face, adapters of PEFT, GGUF files, and palm-rlhf-pytorch."""
