"""Writes the models of the linear and of the vocabulary-parallel loss on GPUs: `python benchmarks/write_models.py`."""

from __future__ import annotations

from linear import model as linear_model
from parallel import model as parallel_model

if __name__ == "__main__":
    for model in (linear_model, parallel_model):
        model.RESULT.write_text(model.markdown())
        print(model.RESULT)
