"""HTML file of an explorer with stored arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.embed import file_html
from bokeh.resources import Resources

from gdn2_jax.explore.draw.layout import (
  make_layout,
  on_ready,
  paragraphs,
  script,
)

# In place of Bokeh's, after which it puts its scripts.
_TEMPLATE = """
{% block preamble %}
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
{% endblock %}
{% block postamble %}
<style>
  html, body { height: auto; }
  body { padding: 8px 16px 24px; background: #ffffff; color: #1f2328;
    font-family: system-ui, sans-serif; }
</style>
{% endblock %}
"""


def render(
  title: str,
  texts: Sequence[str],
  *,
  views: Mapping[str, Mapping[str, int]],
  pool: Sequence[np.ndarray],
  as_is: str,
  **layout: Any,
) -> str:
  """The page as text.

  Args:
    title: heading.
    texts: paragraphs under it.
    views: places in the pool by "layer/head/change" and name of the array.
    pool: arrays.
    as_is: name of the change that changes nothing.
    **layout: arguments of `make_layout`.
  """
  made = make_layout(paragraphs(title, *texts), **layout)
  chosen = {"layer": made.layer, "head": made.head, "change": made.change}
  pick = script(
    "pick",
    shown=made.shown,
    store={"views": views, "pool": list(pool)},
    as_is=as_is,
    **chosen,
  )
  for control in chosen.values():
    control.js_on_change("value", pick)
  on_ready(made.document, pick)
  # Bokeh inlines the components that the layout uses. Its warnings would be of
  # figures that are still empty.
  resources = Resources(mode="inline", log_level="error")
  return file_html(made.document, resources, title, template=_TEMPLATE)
