"""How baton-tiny was trained: plain PyTorch, own text, minutes on one GPU."""
