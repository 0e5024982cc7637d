"""The learning loop: rounds that go from people's votes to a reward model, and on to a better model."""
