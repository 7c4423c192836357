"""The notebooks in a class: exercises that check themselves, and their versions for graders."""
