"""How a weight gets its codes. A module: Knobs, VERSION, KIND, `accepts(scheme)` (why it cannot do a scheme), and `rescale(...)`, or
SEES_TOKENS and `round_weights(...)`."""
