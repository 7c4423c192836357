"""Sampling as OpenAI's clients ask for it: chat pages, agents, evaluation suites."""
