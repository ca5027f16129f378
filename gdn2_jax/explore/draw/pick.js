// Shows the stored arrays of the chosen layer, head and change. Arguments:
// shown, store, layer, head, change, as_is.
const view = (name) => {
  const places = store.views[`${layer.value}/${head.value}/${name}`]
  const arrays = {}
  for (const [key, place] of Object.entries(places)) arrays[key] = store.pool[place]
  return arrays
}
shown.base = view(as_is)
shown.now = view(change.value)
