"""Solutions of notebook 05."""


# 05.1
def answer(rewards):
    total, others = sum(rewards), len(rewards) - 1
    return [reward - (total - reward) / others for reward in rewards]


# 05.2
def answer(prompt, response, meta):
    return float(response == meta["answer"])


# 05.3
def answer(p, group_size):
    return p**group_size + (1 - p) ** group_size
