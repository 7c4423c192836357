"""Solutions of notebook 08."""

# 08.1
answer = ["reward"]

# 08.2
answer = ["TENSAFE_BASE_URL", "TENSAFE_API_KEY"]
