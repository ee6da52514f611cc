"""What verify measures. A module: Knobs, VERSION, READS, LIMITS, FIXED, ALWAYS, `measure(...) -> [Measurement]`."""
