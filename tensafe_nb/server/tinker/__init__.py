"""The protocol of the public `tinker` SDK, over the training clients and artifacts of this server."""
