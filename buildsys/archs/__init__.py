"""How a family of models names its layers. A module: Knobs, VERSION, HANDLES, TURBOMIND, EXPECTS, `describe(config, where)`."""
