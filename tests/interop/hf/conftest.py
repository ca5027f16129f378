"""Tests in with_torch are collected only where the extra "hf" is installed.

`make hf` installs it and runs them; without it, pytest finds no test there and
fails, so that they cannot be left out unseen.
"""

import importlib.util

has_torch = all(map(importlib.util.find_spec, ("torch", "transformers")))
collect_ignore = [] if has_torch else ["with_torch"]
