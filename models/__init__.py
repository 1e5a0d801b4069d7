"""Models that ship with Baton, and the maker of small random ones."""
