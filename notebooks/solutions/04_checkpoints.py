"""Solutions of notebook 04."""


# 04.1
def answer(data):
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


# 04.2
answer = [300, 350, 400]
