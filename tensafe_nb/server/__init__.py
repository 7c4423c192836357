"""The server: offers the embedded core over HTTP; needs the extra `tensafe_nb[server]`."""
