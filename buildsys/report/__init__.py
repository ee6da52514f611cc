"""What `doit report` writes: one self-contained HTML page for a build, and a catalogue of all.

A page loads nothing and runs nothing: its Content-Security-Policy allows its own style and, in the catalogue, its own script, each by its
digest. Text of plots is sized in CSS pixels and their places in percent, so that a phone shows the same plots as a wide screen.
"""
