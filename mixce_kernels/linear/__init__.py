"""The loss of hidden states and a weight: the logits exist a chunk or a tile at a time."""
