"""`gdn2 serve` without its extra."""

import sys

import pytest
from absl import flags
from absl.testing import flagsaver


def test_without_the_extra_it_says_what_to_install(monkeypatch, tmp_path):
  from gdn2_jax.serve import __main__ as command

  if not flags.FLAGS.is_parsed():
    flags.FLAGS(["test"])
  monkeypatch.setitem(sys.modules, "uvicorn", None)
  monkeypatch.delitem(sys.modules, "gdn2_jax.serve.http.process", raising=False)
  with flagsaver.flagsaver(model=str(tmp_path)):
    with pytest.raises(ValueError, match=r"pip install 'gdn2-jax\[serve\]'$"):
      command._serve()
