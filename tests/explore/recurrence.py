"""Eq. 10 and the changes of its gates in float64, written out."""

import numpy as np


def outputs(q, k, v, g, b, w):
  """Outputs [T, V] and states [T, K, V] of one head, token by token."""
  q, k, v, g, b, w = (np.asarray(x, np.float64) for x in (q, k, v, g, b, w))
  S = np.zeros((q.shape[1], v.shape[1]))
  o, states = [], []
  for t in range(len(q)):
    S = np.exp(g[t])[:, None] * S
    S = S + np.outer(k[t], w[t] * v[t] - S.T @ (b[t] * k[t]))
    o.append(q.shape[1] ** -0.5 * S.T @ q[t])
    states.append(S)
  return np.array(o), np.array(states)


def changed(g, b, w_of_heads, head, change):
  """Gates of one value head after a change.

  Args:
    g, b: gates of its key head [T, K].
    w_of_heads: write gates of all value heads of that key head.
    head: index of the value head among them.
    change: Change.
  """
  g, b = np.asarray(g, np.float64), np.asarray(b, np.float64)
  w = np.asarray(w_of_heads[head], np.float64)
  if change.tie:
    every = np.concatenate(w_of_heads, axis=1).astype(np.float64)
    beta = (b.mean(1) + every.mean(1))[:, None] / 2
    b, w = np.broadcast_to(beta, b.shape), np.broadcast_to(beta, w.shape)
  return change.decay * g, change.erase * b, change.write * w
