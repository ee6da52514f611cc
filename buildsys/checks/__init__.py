"""What verify measures. A module: Knobs, VERSION, READS, LIMITS, FIXED, OPTIONAL, ALWAYS, `measure(...) -> [Measurement]`."""
