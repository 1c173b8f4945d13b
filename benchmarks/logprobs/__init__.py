"""The benchmark of tokens' log-probabilities and entropies."""
