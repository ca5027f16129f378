"""Gates of a model's layers changed from outside, without a subclass."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from flax import linen as nn

from gdn2_jax.model.mixers.gdn2 import GDN2Mixer
from gdn2_jax.model.mixers.registry import kind_of

Gates = tuple[Any, Any, Any]


def has_gate_hook(letter: str, config: Any) -> bool:
  """True if the mixer of a letter has the method `gates` of GDN2Mixer.

  Args:
    letter: one of `ModelConfig.pattern`.
    config: ModelConfig.
  """
  types = {"dtype": config.dtype, "param_dtype": config.param_dtype}
  return isinstance(kind_of(letter).make(config, name=None, **types), GDN2Mixer)


@contextlib.contextmanager
def changed_gates(
  change: Callable[[tuple[str, ...], Any, Any, Any], Gates],
) -> Iterator[None]:
  """Passes the gates of every GDN2Mixer that runs within it to `change`.

  For single runs, such as experiments on a trained model. The layers are those
  of the model, and what their own `gates` return is what `change` gets. Enter
  it inside of a jitted function, whose cache does not know of it.

  Args:
    change: change(path, g, b, w) returns (g, b, w) of the same shapes; path is
      that of the module, such as ("group_0", "layer_1", "mixer") where layers
      are not scanned, see `gdn2_jax.model.lm.without_stacks`. A scan's body is
      traced once, with one path for all groups.
  """

  def intercept(call, args, kwargs, context):
    mixer = context.module
    if isinstance(mixer, GDN2Mixer) and context.method_name == "__call__":
      own = mixer.gates

      def gates(g, b, w):
        return change(mixer.path, *own(g, b, w))

      # Modules are frozen outside of setup, and the hook is looked up on the
      # instance: kernels with gates of their own see that it is overridden.
      object.__setattr__(mixer, "gates", gates)
    return call(*args, **kwargs)

  with nn.intercept_methods(intercept):
    yield
