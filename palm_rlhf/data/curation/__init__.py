"""The curation of conversations: steps that clean, choose and cut them, each a generator over conversations."""
