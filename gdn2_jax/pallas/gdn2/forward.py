"""Forward pass of the kernels, and the residuals for the backward pass."""

from gdn2_jax.pallas.gdn2.intra import intra
from gdn2_jax.pallas.gdn2.scan import scan, section_count
from gdn2_jax.pallas.gdn2.sections import start_states


def forward(q, k, v, g, b, w, rates, state, kinds, *, scale, erase_scale, save):
  """Chunkwise Gated DeltaNet-2 (Eqs. 20-27).

  Args:
    q: [B, T, H, K], bfloat16 or float16; T a multiple of 64, K 64 or 128.
    k: [B, T, H, K], in the dtype of q.
    v: [B, T, H, V], in the dtype of q; V a multiple of 64.
    g: [B, T, H, K], float32, or with rates in the dtype of q.
    b: [B, T, H, K], in the dtype of q.
    w: [B, T, H, V], in the dtype of q.
    rates: [B, H, 2, K], float32, or None; see projected.py.
    state: [B, H, K, V], float32.
    kinds: [B, T] int32, blocks.PADDING, TOKEN or RESTART.
    scale: Factor on the output.
    erase_scale: Factor on the erase gate, with rates.
    save: Return residuals.

  Returns:
    o [B, T, H, V], the final state [B, H, K, V], and the residuals: A
    [B, H, NC, C, C] and the states that chunks start from [B, H, NC, K, V],
    in the dtype of q; () if not `save`.
  """
  Y_neg, Qg, Kd, Aqk, A, gamma_C = intra(
    q, k, b, g, kinds, scale, rates=rates, erase_scale=erase_scale
  )
  B, H, chunks, _ = gamma_C.shape
  sections = section_count(B, H, v.shape[-1], chunks)
  options = {"is_projected": rates is not None, "sections": sections}
  if sections > 1:
    state = start_states(Y_neg, Kd, A, gamma_C, v, w, state, **options)
  o, state, states = scan(
    Y_neg, Qg, Kd, Aqk, A, gamma_C, v, w, state, save=save, **options
  )
  return o, state, (A, states) if save else ()
