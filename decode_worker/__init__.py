"""The decode service: its scheduler policy and its side of the hand-over."""
