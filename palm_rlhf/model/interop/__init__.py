"""Weights of other libraries: the folders of Hugging Face, its Cohere models, and palm-rlhf-pytorch."""
