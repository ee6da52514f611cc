"""What surrounds the weights when they leave: the model card, where they come from, digests and signatures; and checking all that.

facts: one finished build, read once. resolved: its recipe in plain data. card, provenance: what is written of it. signing, bundle: keys and
signatures. seal: all of this beside the deployable files. folder, contents, audit: whether anybody's folder is what it says it is.
"""
