"""The chat page of a server that collects feedback: its answers are kept, and judged where they are read."""
