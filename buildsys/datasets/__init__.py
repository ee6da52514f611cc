"""Where text comes from. A module: Knobs, VERSION, READS, and `texts(...)` or `generate(...)`."""
