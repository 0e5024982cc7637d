"""Files that leave the database, and files that come in."""
