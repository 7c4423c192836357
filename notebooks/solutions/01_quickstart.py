"""Solutions of notebook 01."""

# 01.1
answer = 8 * 128 + 128 * 8


# 01.2
def answer(loss):
    import math

    return math.exp(loss)


# 01.3
answer = {"prompt": "2+2=", "completion": "4"}
