"""Benchmarks of the encoder, late interaction, retrieval, training and kernels, against what people use today."""
