"""Rows to batches: what people have is read, tokenised, labelled, padded and shuffled here."""

from tensafe_nb.data.prompts import read_prompt, read_prompts
from tensafe_nb.data.rows import OnBadRows, Row, Rows, read_rows, split_rows
from tensafe_nb.data.text import (
    Batches,
    Encoded,
    Example,
    batches,
    check_fit,
    collate,
    encode,
    encode_rows,
    padding_of,
)

__all__ = [
    "Batches",
    "Encoded",
    "Example",
    "OnBadRows",
    "Row",
    "Rows",
    "batches",
    "check_fit",
    "collate",
    "encode",
    "encode_rows",
    "padding_of",
    "read_prompt",
    "read_prompts",
    "read_rows",
    "split_rows",
]
