"""Corpora of text: downloaded or read from files, joined, tokenized, and kept in the cache."""
