"""What a pull request changes: the recipes of a git ref beside those of the work tree, and what that means for builds and gates."""
