"""Saving, loading, tokenizers and dtypes by transformers' own functions."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from gdn2_jax.data.tokenizer.api import BytesTokenizer
from gdn2_jax.interop.convert import convert
from tests.interop.convert import checkpoints
from tests.interop.hf.test_folder import TEXTS
from tests.interop.hf.with_torch.models import (
  error,
  load,
  make_pair,
  random_ids,
  torch_logits,
)


def test_what_transformers_saves_comes_back(tmp_path):
  pair = make_pair("DS")
  pair.torch.save_pretrained(tmp_path / "saved")
  tokenizer = AutoTokenizer.from_pretrained(pair.folder, trust_remote_code=True)
  tokenizer.save_pretrained(tmp_path / "saved")
  names = {path.name for path in (tmp_path / "saved").iterdir()}
  assert {"modeling_gdn2_jax.py", "recurrence.py", "cache.py"} <= names
  again = load(tmp_path / "saved")
  ids = random_ids(1, 20)
  np.testing.assert_array_equal(
    torch_logits(again, ids), torch_logits(pair.torch, ids)
  )
  convert(tmp_path / "saved", tmp_path / "back", source="hf", target="gdn2_jax")
  checkpoints.assert_same(
    checkpoints.read(tmp_path / "back"),
    checkpoints.read(pair.folder.parent / "ours"),
  )


def test_decays_stay_float32_in_bfloat16(tmp_path):
  pair = make_pair("GMN")
  model = load(pair.folder, dtype=torch.bfloat16)
  dtypes = {n: p.dtype for n, p in model.named_parameters()}
  wide = {n.split(".")[-1] for n, d in dtypes.items() if d == torch.float32}
  assert wide == {
    *("A_log", "dt_bias", "D", "B_bias", "C_bias"),
    *("mimo_x", "mimo_z", "mimo_o"),
  }
  ids = random_ids(1, 20)
  found = torch_logits(model, ids)
  wanted = torch_logits(pair.torch, ids)
  assert found.dtype == np.float32
  rms = np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean())
  assert 1e-4 < rms < 0.1
  model.save_pretrained(tmp_path / "half")
  convert(tmp_path / "half", tmp_path / "back", source="hf", target="gdn2_jax")


def test_the_tokenizer_encodes_as_ours():
  pair = make_pair("DS")
  found = AutoTokenizer.from_pretrained(pair.folder, trust_remote_code=True)
  ours = BytesTokenizer()
  for text in TEXTS:
    assert found(text)["input_ids"] == ours.encode(text), text
    assert found.decode(ours.encode(text)) == text
  assert found.eos_token_id == 256 and found.pad_token_id == 258
  batch = found(["abc", "a"], padding=True, return_tensors="pt")
  assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_card_s_example_runs(monkeypatch):
  pair = make_pair("DS")
  text = (pair.folder / "README.md").read_text()
  code = text.partition("```python\n")[2].partition("```")[0]
  monkeypatch.chdir(pair.folder)
  exec(compile(code, "README.md", "exec"), {})


def test_parts_of_the_model():
  pair = make_pair("DS")
  ids = torch.tensor(random_ids(2, 10))
  config = AutoConfig.from_pretrained(pair.folder, trust_remote_code=True)
  assert (config.hidden_size, config.num_hidden_layers) == (32, 2)
  base = AutoModel.from_pretrained(pair.folder, trust_remote_code=True).eval()
  hidden = base(ids, output_hidden_states=True)
  assert len(hidden.hidden_states) == 3
  logits = pair.torch(ids).logits
  torch.testing.assert_close(
    pair.torch.lm_head(hidden.last_hidden_state), logits
  )
  for kept in (3, torch.tensor([7, 8, 9])):
    found = pair.torch(ids, logits_to_keep=kept).logits
    assert error(found.numpy(), logits[:, 7:].numpy()) <= 1e-6
  embeds = base.get_input_embeddings()(ids)
  found = pair.torch(inputs_embeds=embeds).logits
  torch.testing.assert_close(found, logits)


def test_a_new_model_has_the_paper_s_decays():
  pair = make_pair("DS")
  model = type(pair.torch)(pair.torch.config)
  mixer = model.model.layers[0].mixer
  assert (mixer.A_log.exp() >= 1).all() and (mixer.A_log.exp() <= 16).all()
  dt = torch.nn.functional.softplus(mixer.dt_bias)
  assert (dt >= 0.99e-3).all() and (dt <= 1.01e-1).all()
