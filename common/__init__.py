"""Ids, errors, messages, hashes, configuration: what every part speaks. No torch, no Redis."""
