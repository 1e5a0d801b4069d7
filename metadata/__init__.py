"""All that Baton keeps in Redis."""
