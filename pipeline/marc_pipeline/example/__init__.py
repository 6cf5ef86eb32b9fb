"""The example shop: a seeded daily catalogue, and ratings that depend on the items' texts."""
