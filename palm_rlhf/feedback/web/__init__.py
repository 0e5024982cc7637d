"""The pages of the collection, by FastAPI, Jinja and htmx."""
