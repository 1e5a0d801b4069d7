"""Conversations whose right answers are known: what baton-tiny is trained on and tested with."""
