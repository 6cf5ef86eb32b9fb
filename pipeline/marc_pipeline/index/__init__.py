"""The index stage: choose, patch or build a FAISS index over a plan's files, tune it and measure its recall."""
