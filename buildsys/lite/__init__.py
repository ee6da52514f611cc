"""LMDeploy's `lite`, a quantizer of its own, in a process of its own: asked for codes, and its folder read as our blocks."""
