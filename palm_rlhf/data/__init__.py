"""Data on its way to the model: corpora, conversations and preferences from files, tokenizers and chat templates."""
