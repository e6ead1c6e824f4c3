"""Compositions over the encoder's token vectors, one file each."""
