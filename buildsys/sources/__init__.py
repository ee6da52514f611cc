"""Where a model comes from. A module: Knobs, VERSION, `locate(knobs, base) -> {name: path}` of the files that make the model."""
