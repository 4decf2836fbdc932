"""Communication operators that add in one fixed order."""
