"""The index stage: a FAISS index over a plan's files, chosen, patched or built, and measured against exact search."""

from marc_pipeline.index.choice import EXACT_BELOW, Choice, choose, predict
from marc_pipeline.index.make import Run, in_turn, make_index, satisfies

__all__ = ["EXACT_BELOW", "Choice", "Run", "choose", "in_turn", "make_index", "predict", "satisfies"]
