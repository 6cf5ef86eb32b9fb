"""Bundles: the stages of `marc train`, the promotion gate, and promotion."""
