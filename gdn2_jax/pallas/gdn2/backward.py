"""The backward pass: three kernels."""

from gdn2_jax.pallas.gdn2.intra import intra
from gdn2_jax.pallas.gdn2.intra_grad import intra_grad
from gdn2_jax.pallas.gdn2.scan_grad import scan_grad


def backward(
  q, k, v, g, b, w, rates, kinds, residuals, do, dstate, *, scale, erase_scale
):
  """Gradients of forward.forward (section 3.4, appendix B).

  Args:
    q: [B, T, H, K], as the forward pass took it; so k, v, g, b, w.
    k: [B, T, H, K].
    v: [B, T, H, V].
    g: [B, T, H, K], float32, or with rates in the dtype of q.
    b: [B, T, H, K].
    w: [B, T, H, V].
    rates: [B, H, 2, K], float32, or None.
    kinds: [B, T] int32.
    residuals: what the forward pass saved.
    do: gradient of the output [B, T, H, V], in its dtype, zero at padding.
    dstate: gradient of the final state [B, H, K, V], float32.
    scale: factor on the output.
    erase_scale: of projected.py.

  Returns:
    dq, dk, dv, dg, db, dw, drates and that of the initial state, in the shapes
    and dtypes of the inputs.
  """
  A, states = residuals
  gates = {"rates": rates, "erase_scale": erase_scale}
  Y_neg, Qg, Kd, Aqk, _, gamma_C = intra(q, k, b, g, kinds, scale, A=A, **gates)
  dstates, dinitial = scan_grad(Y_neg, Qg, Kd, Aqk, gamma_C, do, dstate)
  dq, dk, db, dg, dv, dw, drates = intra_grad(
    q, k, b, g, kinds, v, w, do, A, Aqk, states, dstates, scale, **gates
  )
  if drates is not None:
    drates = drates.sum(axis=2)
  return dq, dk, dv, dg, db, dw, drates, dinitial
