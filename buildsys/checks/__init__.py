"""What verify measures. A module: Knobs, VERSION, READS, LIMITS, FIXED, OPTIONAL, ALWAYS, ASIDE, `measure(...) -> [Measurement]`.

ASIDE: knobs that say how it is run or judged, and change nothing that is measured; they are in no key, and neither are LIMITS.
"""
