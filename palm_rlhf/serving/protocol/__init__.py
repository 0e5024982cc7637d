"""OpenAI's protocol: what requests may hold, what they ask of the engine, and the replies to them."""
