"""The policy of reinforcement learning, its critic and rewards, and the responses that it draws."""
