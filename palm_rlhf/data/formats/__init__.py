"""The formats of conversations in the ecosystem, each read as messages `{"role", "content"}`."""
