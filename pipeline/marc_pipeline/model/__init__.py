"""The model: backbone, compressor, encoder, bundle, training."""
