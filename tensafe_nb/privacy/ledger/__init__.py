"""The privacy ledger: accounts, what is charged to them, and what may be stated."""
