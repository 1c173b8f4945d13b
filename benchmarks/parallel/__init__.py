"""The benchmark and the model of the loss of a sharded vocabulary."""
