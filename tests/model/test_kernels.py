"""The gradient of the hybrid is traced with every kernel, on split meshes."""

import re

import jax
import jax.numpy as jnp
import pytest

from gdn2_jax.kernels import target
from gdn2_jax.model.lm import LM
from gdn2_jax.sharding import MeshConfig, make_mesh, use_mesh
from tests.model.models import small_config, small_gdn2
from tests.random_params import random_params

ALWAYS = {"short_conv", "short_conv_grad", "gated_norm", "gated_norm_grad"}
ALWAYS |= {"gdn2_intra", "gdn2_scan", "gdn2_scan_grad", "gdn2_intra_grad"}
ATTENTION = {"attention", "attention_grad_q", "attention_grad_kv"}


@pytest.mark.parametrize(
  ("mesh", "kernels"),
  [
    (MeshConfig(fsdp=2, tensor=2), ALWAYS | ATTENTION),
    # Keys from the shard before are context, which the kernels do not take.
    pytest.param(
      MeshConfig(tensor=2, context=2), ALWAYS, marks=pytest.mark.deep
    ),
  ],
  ids=["heads", "tokens"],
)
def test_every_kernel_is_in_the_gradient(mesh, kernels):
  config = small_config("GS", vocab_size=64, gdn2=small_gdn2(""))
  config.dtype = "bfloat16"
  config.gdn2.key_dim = config.gdn2.value_dim = 64
  config.attention.head_dim = 64
  tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)

  def loss(params, tokens, segment_ids):
    return (
      LM(config)
      .apply(
        {"params": params}, tokens, tokens, segment_ids, method="token_losses"
      )
      .sum()
    )

  with use_mesh(make_mesh(mesh, jax.devices()[:4])), target.use("compile"):
    params = jax.eval_shape(lambda: random_params(config))
    program = jax.make_jaxpr(jax.grad(loss))(params, tokens, tokens)
  names = set(re.findall(r"name=(\w+)", str(program)))
  assert names & (ALWAYS | ATTENTION) == kernels
