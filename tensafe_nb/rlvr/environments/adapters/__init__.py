"""Environments written for other toolkits, as they are: thin adapters that import those only when they are used."""
