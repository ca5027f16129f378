r"""Converts weights from one program's names and layouts to another's.

  python -m gdn2_jax.convert --from=official --to=gdn2_jax \
    --src=checkpoint/ --out=models/hybrid --probe=io.npz
  python -m gdn2_jax.convert --from=gdn2_jax --to=fla \
    --src=runs/tiny --out=models/tiny_fla --output_gate=silu
  python -m gdn2_jax.convert --from=official --to=gdn2_jax \
    --src=gpt.safetensors --out=models/1p3b --preset=gdn2_1.3B
  python -m gdn2_jax.convert --from=fla --to=gdn2_jax --src=kda/ --out=kda2
  python -m gdn2_jax.convert --from=gdn2_jax --to=hf --src=runs/tiny --out=hf

Dialects, which must be given, as no file names its own:
  official  the public PyTorch program (`transformer.h.0.attn...`); its output
            gate is a SiLU
  fla       flash-linear-attention (`model.layers.0.attn...`), GDN-2 or KDA; its
            output gate is a sigmoid. KDA becomes GDN-2 with tied gates, or
            with --as=kda a model of pattern K, which --to=fla writes back
  hf        a folder that AutoModelForCausalLM of Hugging Face transformers
            opens with trust_remote_code=True: the model in torch is in it
  gdn2_jax  a published-model folder; as --from also a workdir of training

Weights are safetensors: model.safetensors or shards with their index, in a
folder, or one file; a .pth is refused with the command that converts it. Sizes
come from the tensors and from the config.json beside them, which must agree.
--from=fla needs norm_eps and, for a hybrid, attn; a hybrid --from=official
needs n_head and local_window. They may come from --config, --preset or --set as
well. A model whose output gate is not that of the dialect needs --output_gate.
Short convolutions are read with the oldest input first, as PyTorch has them;
--from_conv_order changes that.

Only permutes: there and back gives the same bits. A_log and dt_bias are float32
whatever the rest is. Nothing is written before all is checked. Memory: the
model once, as it is written (one shard of 5 GB at most unless --to=gdn2_jax),
and two of its tensors. Exit status: 0 done; 1 refused, or the logits of --probe
differ by more than --tolerance (the reason is on standard error).
"""

import json
from typing import Any

from absl import flags

from gdn2_jax import cli
from gdn2_jax.interop.convert.options import ALL_DIALECTS, OURS, Options
from gdn2_jax.interop.convert.probe import read_probe, run_probe
from gdn2_jax.interop.convert.run import convert

_FROM = flags.DEFINE_string("from", None, f"One of {', '.join(ALL_DIALECTS)}.")
_TO = flags.DEFINE_string("to", None, f"One of {', '.join(ALL_DIALECTS)}.")
_SRC = flags.DEFINE_string("src", None, "Folder or .safetensors file to read.")
_OUT = flags.DEFINE_string("out", None, "Folder to write, absent or empty.")
_CONFIG = flags.DEFINE_string(
  "config", None, "config.json to use in place of the one beside the weights."
)
_PRESET = flags.DEFINE_string(
  "preset",
  None,
  "Published size of the official program in place of a config.json: gdn2_1.3B "
  "or swa_gdn2_1.3B. The number of parameters must be that of the preset.",
)
_SET = flags.DEFINE_multi_string(
  "set", [], "KEY=VALUE over the config.json, the value as JSON; repeatable."
)
_IGNORE_CONFIG = flags.DEFINE_list(
  "ignore_config", [], "Unknown keys of config.json that change nothing."
)
_OUTPUT_GATE = flags.DEFINE_string(
  "output_gate", None, "Activation of the output gate: silu or sigmoid."
)
_FROM_CONV_ORDER = flags.DEFINE_string(
  "from_conv_order",
  None,
  "Input that the first tap of a short convolution multiplies in --src: "
  "oldest_first (PyTorch's Conv1d, the default) or newest_first.",
)
_TO_CONV_ORDER = flags.DEFINE_string(
  "to_conv_order", None, "The same for --out."
)
_STRIP_PREFIX = flags.DEFINE_string(
  "strip_prefix", "", "Prefix of all names in --src, such as _orig_mod."
)
_UNTIE_HEAD = flags.DEFINE_bool(
  "untie_head", False, "Copy the embedding where the head is tied to it."
)
_DTYPE = flags.DEFINE_string(
  "dtype", None, "Dtype of the parameters in --out; by default that in --src."
)
_AS = flags.DEFINE_string(
  "as",
  None,
  "Mixer that Kimi Delta Attention becomes: gdn2 (the default) or kda.",
)
_STEP = flags.DEFINE_integer(
  "step", None, "Checkpoint of a workdir; by default the newest."
)
_PROBE = flags.DEFINE_string(
  "probe", None, "An .npz with input_ids [B, T] and their logits [B, T, VOCAB]."
)
_TOLERANCE = flags.DEFINE_float(
  "tolerance", 1e-4, "Largest relative error of the logits of --probe."
)


def main(argv: list[str]) -> None:
  """Entry point: checks the command line, converts, probes."""
  cli.refuse_positional(argv, "--src=checkpoint/")
  with cli.one_line_errors():
    options = _options()
    options.check(_FROM.value, _TO.value)
    probe = read_probe(_PROBE.value) if _PROBE.value else None
    report = convert(
      _SRC.value,
      _OUT.value,
      source=_FROM.value,
      target=_TO.value,
      options=options,
      probe=probe,
    )
    print(f"{report}\n\nwrote {', '.join(report.files)} to {_OUT.value}")
    if probe is None:
      return
    gate = report.opened.config.gdn2.output_gate
    error = run_probe(_OUT.value, _TO.value, probe, gate)
  print(error)
  if error.exceeds(_TOLERANCE.value):
    cli.fail(
      f"--probe: above --tolerance={_TOLERANCE.value:g}: {_OUT.value} is not "
      "the model that gave these logits"
    )


def _options() -> Options:
  for flag in (_FROM, _TO, _SRC, _OUT):
    if not flag.value:
      raise ValueError(
        f"--{flag.name} is missing, as in --from=official --to={OURS} "
        "--src=checkpoint/ --out=models/new"
      )
  if not 0 < _TOLERANCE.value < float("inf"):
    raise ValueError(f"--tolerance={_TOLERANCE.value}: expected above 0")
  return Options(
    config=_CONFIG.value,
    preset=_PRESET.value,
    values=dict(map(_key_value, _SET.value)),
    ignored=tuple(_IGNORE_CONFIG.value),
    output_gate=_OUTPUT_GATE.value,
    from_conv_order=_FROM_CONV_ORDER.value,
    to_conv_order=_TO_CONV_ORDER.value,
    strip_prefix=_STRIP_PREFIX.value,
    untie_head=_UNTIE_HEAD.value,
    dtype=_DTYPE.value,
    as_mixer=_AS.value,
    step=_STEP.value,
  )


def _key_value(text: str) -> tuple[str, Any]:
  key, equals, value = text.partition("=")
  if not key or not equals:
    raise ValueError(f"--set={text}: expected KEY=VALUE")
  try:
    return key, json.loads(value)
  except json.JSONDecodeError:
    return key, value  # --set=output_gate=silu


if __name__ == "__main__":
  cli.run(main, __doc__)
