"""How codes lie on disk. A module: Knobs, VERSION, FLOATS, `accepts`, `fits`, `layout`, `pack`, `unpack`, `config`."""
