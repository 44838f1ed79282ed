"""The names of the worlds that `worlds` describes. Without numpy."""

from typing import Literal

WorldName = Literal["broad", "ffhq"]
