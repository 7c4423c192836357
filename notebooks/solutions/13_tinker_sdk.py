"""Solutions of notebook 13."""

# 13.1
answer = [0, 0, 1, 1]


# 13.2
def answer(loss_sum, weights):
    return loss_sum / sum(weights)
