"""Solutions of notebook 10."""

# 10.1
answer = 135 * 4

# 10.2
answer = {
    "messages": [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Arr, that be Paris, matey."},
    ]
}
