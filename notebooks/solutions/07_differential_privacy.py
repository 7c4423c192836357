"""Solutions of notebook 07."""


# 07.1
def answer(gradient, bound):
    norm = sum(value**2 for value in gradient) ** 0.5
    return [value * min(1.0, bound / norm if norm else 1.0) for value in gradient]


# 07.2
def answer(noise_multiplier, max_grad_norm, batch_size):
    return noise_multiplier * max_grad_norm / batch_size


# 07.3
answer = 3.0
