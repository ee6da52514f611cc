"""How a weight gets its codes. A module: Knobs, VERSION, KIND, and `rescale(...)`, or SEES_TOKENS and `round_weights(...)`."""
