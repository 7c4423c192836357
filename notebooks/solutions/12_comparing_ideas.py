"""Solutions of notebook 12."""


# 12.1
def answer(a, b):
    import numpy as np

    differences = np.array(b) - np.array(a)
    return [differences.mean(), differences.std(ddof=1) / len(differences) ** 0.5]


# 12.2
def answer(arms):
    return arms * (arms - 1) // 2
