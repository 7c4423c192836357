"""Who may enter, with what, and how much of it: tokens, JupyterHub's users, limits, and the guard that asks."""
