"""Environments: conversations of several turns, in which a generator function speaks with the policy and rewards it.

`environment.py` says what one is, `stage.py` and `hosts.py` where its generators live between turns, `play.py` plays a
step's conversations turn by turn, `transcript.py` grows their tokens, `replay.py` judges recorded ones again.

The record: a conversation is a `Trajectory` (rollouts/trajectories.py). `prompt_tokens` is what the environment told
first, `tokens` all behind it in the order in which the policy saw it, with `mask`, `logprobs` and `raw_logprobs` 0
where the environment speaks. `turns` are the messages as `TurnRecord`s: role, text, span in `tokens`, whether it is
trained, the reward of a turn of the policy, and `meta`: keys of a message beside role and content, and what `Turn` and
`Outcome` bring.
"""
