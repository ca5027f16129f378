// Draws the arrays of shown.now, and shown.base for comparison. Arguments:
// shown, parts, slider, unit, mark.
const get = (dict, key) => (dict instanceof Map ? dict.get(key) : dict[key])
const now = (name) => Float32Array.from(get(shown.now, name))
const base = (name) => Float32Array.from(get(shown.base, name))
const T = now("norm").length

// Kept per token is exp(-ln 2 / half-life).
const is_rate = unit.value.startsWith("e^g")
const spans = get(shown.now, "half_life")
const K = spans.length / T
const rates = now("half_life").map((x) => Math.exp(-Math.LN2 / x))
const image = (source, values) => {
  source.data = {
    image: [values], x: [-0.5], y: [-0.5], dw: [T], dh: [values.length / T],
  }
}
image(parts.decay_source, spans)
// An array of Bokeh knows its shape.
image(parts.rate_source, new spans.constructor(rates, spans.shape))
for (const [name, is_shown] of [["decay", !is_rate], ["rate", is_rate]]) {
  parts[`${name}_image`].visible = is_shown
  parts[`${name}_bar`].visible = is_shown
}
image(parts.erase_source, get(shown.now, "erase"))
image(parts.write_source, get(shown.now, "write"))
image(parts.reads_source, get(shown.now, "reads"))
for (const [range, name] of [["key", "erase"], ["value", "write"]])
  parts[`${range}_range`].end = now(name).length / T - 0.5

const limit = now("reads").reduce((most, x) => Math.max(most, Math.abs(x)), 1e-30)
parts.reads_mapper.low = -limit
parts.reads_mapper.high = limit

const channel = Array.from({length: K}, (_, i) => i)
const finite = (values) => Array.from(values, (x) => (isFinite(x) ? x : NaN))
parts.span_source.data = {
  channel, index: Array.from(now("key_channels")),
  base: finite(base("span")), now: finite(now("span")),
}
const t = Array.from({length: T}, (_, i) => i)
const token = shown.pieces
parts.line_source.data = {
  t, token, kl: now("kl"), norm_base: base("norm"), norm_now: now("norm"),
  rank_base: base("rank"), rank_now: now("rank"),
}
parts.time_range.end = T - 0.5
if (slider.value > T - 1) slider.value = T - 1
slider.end = T - 1
mark.execute(slider)
