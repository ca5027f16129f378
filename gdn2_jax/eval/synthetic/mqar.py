"""Multi-query associative recall in the layout of the Zoology suite.

Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language
Models" (arXiv 2312.04927): key-value pairs, one token after the other, then the
keys again at distances that follow a power law, among random tokens.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from gdn2_jax.eval.synthetic.steps import (
  NO_LABEL,
  Example,
  integers,
  order,
  uniforms,
)


@dataclasses.dataclass(frozen=True)
class Mqar:
  """Recall of key-value pairs in the token format.

  Keys are tokens 1 to vocab_size / 2 - 1, values those from vocab_size / 2 on;
  neither repeats. The prediction at a repeated key is the key's value.

  Attributes:
    length: Tokens T.
    pairs: Key-value pairs, which take the first 2 * pairs tokens.
    vocab_size: Tokens of keys and values together.
    power: Exponent a of the distance d to the repeated key, p(d) ~ d^(a - 1).
  """

  length: int = 64
  pairs: int = 4
  vocab_size: int = 8192
  power: float = 0.01
  groups: ClassVar[tuple[str, ...]] = ("bound",)

  def __post_init__(self):
    half = self.vocab_size // 2
    if self.vocab_size % 2 or half < 2:
      raise ValueError(
        f"Mqar: vocab_size={self.vocab_size}: expected an even number >= 4"
      )
    if not 1 <= self.pairs <= half - 1:
      raise ValueError(
        f"Mqar: pairs={self.pairs}: expected 1 to {half - 1}, the keys of"
        f" vocab_size={self.vocab_size}"
      )
    if self.length < 4 * self.pairs:
      raise ValueError(
        f"Mqar: length={self.length}: expected at least {4 * self.pairs}, for"
        f" pairs={self.pairs} and their queries"
      )

  def example(self, key: jax.Array) -> Example:
    """Draws one example of `length` tokens."""
    n, half, context = self.pairs, self.vocab_size // 2, 2 * self.pairs
    places = (self.length - context) // 2
    u = uniforms(key, half - 1, half, places, self.length)
    keys, values = 1 + order(u[0])[:n], half + order(u[1])[:n]
    weight = (self.power - 1) * jnp.log(jnp.arange(1.0, places + 1))
    # The largest of log-weights with Gumbel noise are a draw without
    # replacement, in the order of drawing.
    noisy = weight - jnp.log(-jnp.log(jnp.maximum(u[2], 2.0**-24)))
    at = context + 2 * jax.lax.top_k(noisy, n)[1]
    tokens = integers(u[3], 0, self.vocab_size)
    pairs = jnp.stack([keys, values], axis=-1).reshape(-1)
    tokens = tokens.at[:context].set(pairs).at[at].set(keys)
    labels = jnp.full(self.length, NO_LABEL).at[at].set(values)
    return Example(
      tokens.astype(jnp.int32), labels, jnp.zeros(self.length, jnp.int32)
    )
