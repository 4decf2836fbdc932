"""Hugging Face folders, both ways: parameter names, config.json and adapter_config.json. Pure functions without torch."""
