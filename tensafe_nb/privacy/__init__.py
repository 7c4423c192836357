"""Differential privacy: noise and clipping, the accountant, the ledger of charges, and the statement about them."""
