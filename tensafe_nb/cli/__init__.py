"""The command line: `tensafe-nb` and `python -m tensafe_nb.cli`."""
