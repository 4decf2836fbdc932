"""Checkpoints: each a Hugging Face folder, each with the digest of every byte, published by one rename."""
