"""Measurements against named peers: `python -m bench` prints every row, `python -m bench queue` some of them."""
