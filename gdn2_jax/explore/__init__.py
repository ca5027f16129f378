"""Interactive explorer of the gates and states of a model over a text."""

from gdn2_jax.explore.live import explore
from gdn2_jax.explore.page import save_page

__all__ = ["explore", "save_page"]
