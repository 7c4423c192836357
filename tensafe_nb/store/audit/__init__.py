"""The audit log: appended, chained, verified."""
