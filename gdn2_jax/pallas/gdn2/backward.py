"""Backward pass of forward.py."""

from gdn2_jax.pallas.gdn2.intra import intra
from gdn2_jax.pallas.gdn2.intra_grad import intra_grad
from gdn2_jax.pallas.gdn2.scan_grad import scan_grad, section_count
from gdn2_jax.pallas.gdn2.sections import end_gradients


def backward(
  q, k, v, g, b, w, rates, kinds, residuals, do, dstate, *, scale, erase_scale
):
  """Gradients of forward.forward (section 3.4, appendix B).

  do is the gradient of the output [B, T, H, V], in its dtype and zero at
  padding, and dstate that of the final state [B, H, K, V], float32; the other
  arguments are those of the forward pass and its residuals. Returns dq, dk, dv,
  dg, db, dw, drates and the gradient of the initial state, in the shapes and
  dtypes of the inputs.
  """
  A, states = residuals
  gates = {"rates": rates, "erase_scale": erase_scale}
  Y_neg, Qg, Kd, Aqk, _, gamma_C = intra(q, k, b, g, kinds, scale, A=A, **gates)
  keys = (Y_neg, Qg, Kd, Aqk, gamma_C)
  B, H, chunks, _ = gamma_C.shape
  sections = section_count(B, H, v.shape[-1], chunks)
  if sections > 1:
    dstate = end_gradients(*keys, do, dstate, sections=sections)
  dstates, dinitial = scan_grad(*keys, do, dstate, sections=sections)
  dq, dk, db, dg, dv, dw, drates = intra_grad(
    q, k, b, g, kinds, v, w, do, A, Aqk, states, dstates, scale, **gates
  )
  if drates is not None:
    drates = drates.sum(axis=2)
  return dq, dk, dv, dg, db, dw, drates, dinitial
