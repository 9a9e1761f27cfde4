"""Building blocks of T5: layers, attention, relative position."""
