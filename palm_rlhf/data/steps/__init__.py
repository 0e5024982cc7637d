"""Steps that clean, choose and cut conversations; each is a generator over them."""
