"""A real language model on a laptop: SmolLM2-135M-Instruct, one-sentence answers, and VADER's sentiment."""
