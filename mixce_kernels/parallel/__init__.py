"""The loss of a vocabulary that the ranks of a process group share."""
