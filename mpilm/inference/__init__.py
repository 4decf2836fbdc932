"""Trained models in use: loaded from a folder, generating text, scoring text."""
