"""`python -m buildsys`: see cli.py."""

import sys

from buildsys.cli import main

sys.exit(main())
