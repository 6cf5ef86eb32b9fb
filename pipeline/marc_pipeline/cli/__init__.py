"""The command line ``marc``: one module per group of commands, and their shared options and output."""
