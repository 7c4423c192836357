"""How a client reaches its core: in the same process now, over HTTP later."""
