"""Inspect's command line in a process of its own."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path


def inspect(words: list[str], cwd: Path, environment: Mapping[str, str]) -> None:
    """Be ``inspect WORDS…`` in a folder and in the environment of `evals.conftest.installed`."""
    os.chdir(cwd)
    os.environ.update(environment)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)  # where entry points are looked for
    sys.argv = ["inspect", *words]
    from inspect_ai._cli.main import main

    main()
