"""A package, so that tests share `tests.factories` wherever another package of this name is installed."""
