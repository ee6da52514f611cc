"""Talking to the places that models come from and go to, each through its own client or protocol.

hub*: the Hugging Face hub. modelscope*: ModelScope. registry*, modelpack: OCI registries. openxlab*: OpenXLab, in a process apart.
What they know of files ends in `Located`; what a recipe can say of them stands in sources/, datasets/ and publishers/.
"""
