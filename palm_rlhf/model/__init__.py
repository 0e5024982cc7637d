"""Floor 1: PaLM, its cache, its adapters, and how it is stored."""
