"""How methods are drawn: Okabe and Ito's colours, markers and hatches."""

from typing import NamedTuple

COLOURS = {
    "black": "#000000",
    "dark": "#707070",
    "light": "#B8B8B8",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
}
FIXED, DOTTED = "////", "...."  # hatches; lines are dashed instead


class Style(NamedTuple):
    """Colour (a key of `COLOURS`), marker and hatch of a method."""

    colour: str
    marker: str = "o"
    hatch: str = ""
