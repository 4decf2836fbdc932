"""A step as a list of actions: made by a pure function, lowered, executed by a small interpreter."""
