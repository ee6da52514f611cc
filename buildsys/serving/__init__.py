"""What serves an artifact: LMDeploy's engines, their settings, and their server.

settings: what the recipe decides of an engine. guide: how a person starts one, as files of the artifact.
"""
