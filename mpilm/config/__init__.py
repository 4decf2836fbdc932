"""Settings: their definition (schema), named configs (presets), reading (parse) and checking (check)."""
