"""Bokeh figures, layout and scripts of the explorer."""
