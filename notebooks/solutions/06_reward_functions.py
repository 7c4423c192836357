"""Solutions of notebook 06."""

# 06.1
answer = "0123456789"


# 06.2
def answer(prompt, response, meta):
    right = meta.get("answer")
    if right is None:
        return None
    if response == right:
        return 1.0
    return 0.5 if len(response) == 3 and response.isdigit() else 0.0
