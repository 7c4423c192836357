"""Pictures and tables that stay in the notebook file."""
