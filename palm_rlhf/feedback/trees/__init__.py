"""Message trees that people grow: states, tasks, reviews and rankings."""
