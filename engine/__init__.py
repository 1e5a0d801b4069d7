"""One model on one rank: weights, blocks, prefix cache, batch, forward, sampling."""
