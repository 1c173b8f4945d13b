"""The benchmark and the model of the loss with its linear head."""
