"""The comparison of etas on a pretrained model: the model, its fine-tuning, its samples, and what is said of them."""

import sys
from pathlib import Path

# Its text, its sampler, the counts of samples and their report are those of the example that compares etas from random
# weights.
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
