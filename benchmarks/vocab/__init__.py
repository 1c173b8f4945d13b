"""The benchmark of the loss over logits."""
