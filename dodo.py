"""doit's entry: `doit list` shows what there is to do."""

from buildsys.tasks import *  # noqa: F403
