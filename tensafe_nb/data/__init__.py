"""From what people have to batches: rows are read, tokenised, labelled, padded and shuffled here."""

from tensafe_nb.data.prompts import read_prompts
from tensafe_nb.data.rows import Row, read_rows
from tensafe_nb.data.text import Batches, Example, batches, collate, encode, encode_rows, padding_of

__all__ = [
    "Batches",
    "Example",
    "Row",
    "batches",
    "collate",
    "encode",
    "encode_rows",
    "padding_of",
    "read_prompts",
    "read_rows",
]
