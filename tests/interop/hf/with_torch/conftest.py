"""transformers without a network, and its copies of code in a new folder."""

import atexit
import os
import shutil
import tempfile

# Read once, when transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()

import pytest
import torch
from transformers.utils import logging

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], True)
torch.set_num_threads(1)
logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def no_gradients():
  """Tests of gradients switch them on."""
  with torch.no_grad():
    yield
