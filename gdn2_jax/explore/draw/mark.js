// Moves the mark to a token and draws what belongs to it. Arguments: shown,
// parts, spans, slider, around, status.
const get = (dict, key) => (dict instanceof Map ? dict.get(key) : dict[key])
const now = (name) => Float32Array.from(get(shown.now, name))
const T = now("norm").length
const t = Math.min(slider.value, T - 1)
for (const span of spans) span.location = t
const pieces = shown.pieces

const reads = now("reads").slice(t * T, (t + 1) * T)
parts.read_source.data = {
  s: Array.from({length: T}, (_, s) => s), size: reads, token: pieces,
  color: Array.from(reads, (x) => (x < 0 ? "#d55e00" : "#0072b2")),
}

const n = now("words").length / T
const row = (name) => Array.from(now(name).slice(t * n, (t + 1) * n))
// A factor is unique: a zero-width space tells equal labels apart.
const names = []
for (const id of row("words")) {
  let name = get(shown.words, String(id))
  while (names.includes(name)) name += "\u200b"
  names.push(name)
}
parts.word_range.factors = [...names].reverse()
parts.next_source.data = {name: names, before: row("before"), after: row("after")}

const escape = (x) =>
  x.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;")
const before = pieces.slice(0, t).join(""), after = pieces.slice(t + 1).join("")
around.text =
  (before.length > 110 ? "... " : "") + escape(before.slice(-110)) +
  `<mark>${escape(pieces[t])}</mark>` +
  escape(after.slice(0, 70)) + (after.length > 70 ? " ..." : "")
const kl = now("kl")[t]
status.text =
  `Token ${t} of 0 to ${T - 1}: <b>${escape(pieces[t])}</b>. Next token: ` +
  `KL(before || after) = ${kl === 0 ? "0" : kl.toPrecision(3)} nats.`
