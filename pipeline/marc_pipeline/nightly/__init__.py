"""The stages of a nightly run: plan, encode, audit, publish."""
