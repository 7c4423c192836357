"""Solutions of notebook 03."""

# 03.1
answer = [6, 7, 8, -100]


# 03.2
def answer(chosen, rejected, margin):
    return max(0.0, margin - (chosen - rejected))


# 03.3
import math

answer = math.log(2048)
