"""The loss of logits: its body, its operators and their derivatives."""
