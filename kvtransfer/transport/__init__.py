"""Real NIXL and an in-process transport behind one interface."""
