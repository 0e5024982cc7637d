"""The server that speaks OpenAI's protocol, around one engine."""
