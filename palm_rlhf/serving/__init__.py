"""Replies from a trained model: an engine that batches requests, a server with OpenAI's protocol, a terminal chat."""
