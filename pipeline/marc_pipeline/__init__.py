"""Offline embedding precompute: catalogue, plan, encode, audit, index, release, read."""
