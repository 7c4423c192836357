"""The HTTP face of the embedded core; needs the extra `tensafe_nb[server]`."""
