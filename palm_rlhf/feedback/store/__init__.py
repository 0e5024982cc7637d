"""The database of people, their contributions, and the rounds that learn from them."""
