"""A step's rollouts as a page shows them: grouped by prompt, token by token, with the reason where nothing is learned.

Texts of models are untrusted: they travel as plain strings, and the page enters them as text.
"""

import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tensafe_nb.registry import load_dotted

PUSHED = 64_000  # bytes of the newest step's rollouts, which are sent unasked
ASKED = 400_000  # bytes of those that a page asks for
MOST_TEXT = 2_000  # characters of a prompt or an answer
MOST_TOKENS = 400  # that are coloured one by one
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)

Decode = Callable[[Sequence[int]], list[str]]


def message(
    step: int, path: Path, decode: Decode | None, limit: int, *, held_out: bool = False
) -> dict[str, Any]:
    """Return the message that shows the rollouts of a step, as many groups of them as fit a limit of bytes.

    Args:
        step: Whose rollouts they are.
        path: Where they lie.
        decode: Turns token ids into their texts; None where there is no tokenizer: then answers stay whole.
        limit: Of the message as JSON.
        held_out: Whether they answer the held-out prompts, which keep their order: they are compared across steps.

    Raises:
        ValidationError: The file is gone, or does not fit.
    """
    batch: Any = load_dotted("tensafe_nb.rlvr.rollouts.trajectories:TrajectoryBatch").load(path)
    groups: list[dict[str, Any]] = []
    room = limit - 200
    for group in sorted(
        batch.groups, key=lambda group: not (held_out or group.has_signal)
    ):  # what teaches first
        shown = answers_shown(group, decode) if held_out else group_shown(group, decode)
        room -= len(json.dumps(shown)) + 2
        if room < 0:
            break
        groups.append(shown)
    return {
        "t": "rollouts",
        "step": step,
        "groups": groups,
        "left_out": len(batch.groups) - len(groups),
        **({"thrown_away": batch.thrown_away} if batch.thrown_away else {}),
    }


def group_shown(group: Any, decode: Decode | None) -> dict[str, Any]:
    return {
        "id": group.prompt_id,
        "prompt": clipped(group.prompt),
        "mean": _number(group.mean),
        "std": _number(group.std),
        "signal": bool(group.has_signal),
        # what was known of the prompt when it was chosen
        **({"answered": group.answered, "rate": _number(group.solve_rate)} if group.answered else {}),
        "r": [rollout_shown(rollout, group, decode) for rollout in group.rollouts],
    }


def answers_shown(group: Any, decode: Decode | None) -> dict[str, Any]:
    """Return the answers to a held-out prompt: the first is the greedy one, and none was to teach anything."""
    sampled = replace(group, rollouts=group.rollouts[1:])
    shown = group_shown(group, decode) | {"mean": _number(sampled.mean), "std": _number(sampled.std)}
    for rollout in shown["r"]:
        rollout.pop("why", None)
    shown["r"][0]["greedy"] = True
    return shown


def rollout_shown(rollout: Any, group: Any, decode: Decode | None) -> dict[str, Any]:
    # of tokens that the loss looks at: of a conversation, those of the policy
    scalar = load_dotted("tensafe_nb.rlvr.rollouts.trajectories:mean_advantage")(rollout)
    shown: dict[str, Any] = {
        "text": clipped(rollout.response),
        "reward": _number(rollout.reward),
        "adv": _number(scalar),
        "end": rollout.finish_reason,
        "policy": rollout.policy_version,
        "n": rollout.length,
    }
    spoken = rollout.turns is not None
    optional = {
        "parts": {name: _number(value) for name, value in (rollout.reward_parts or {}).items()},
        "error": rollout.reward_error,
        "why": why_zero(rollout, group),
        "tok": None if spoken else tokens_shown(rollout, decode, 0, len(rollout.tokens)),
        "turns": turns_shown(rollout, group, decode) if spoken else None,
    }
    return shown | {name: value for name, value in optional.items() if value}


def pieces(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """Return the text of each token; a character that takes several tokens is the last one's."""
    texts: list[str] = []
    begun: list[int] = []  # tokens of a character that is not whole yet
    for number, token in enumerate(ids, 1):
        begun.append(token)
        text = decode(begun)
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or len(begun) == 4 or number == len(ids)
        texts.append(text if whole else "")
        begun = [] if whole else begun
    return texts


def tokens_shown(rollout: Any, decode: Decode | None, start: int, stop: int) -> list[list[Any]] | None:
    """Return [text, advantage] of each token from `start` on; advantage None is "as the whole answer"."""
    if decode is None or start == stop:
        return None
    texts = decode(rollout.tokens[start : min(stop, start + MOST_TOKENS)])
    each = rollout.advantage if isinstance(rollout.advantage, list) else None
    mask = rollout.mask or [1] * len(rollout.tokens)
    return [
        [text, 0.0 if not mask[i] else (None if each is None else _number(each[i]))]
        for i, text in enumerate(texts, start)
    ]


def turns_shown(rollout: Any, group: Any, decode: Decode | None) -> list[dict[str, Any]]:
    """Return who said what in a conversation, token by token where that was the policy.

    What was told first is left out where it is the prompt of the group, which is shown once.
    """
    left, shown = MOST_TOKENS, []
    for turn in rollout.turns:
        policy = turn.role == "assistant"
        if not policy and turn.stop == 0 and rollout.prompt == group.prompt:
            continue
        tokens = tokens_shown(rollout, decode, turn.start, turn.stop) if policy and left > 0 else None
        left -= len(tokens or ())
        optional = {
            "tok": tokens,
            "reward": _number(turn.reward),
            "name": turn.meta.get("name"),
            "calls": [call_shown(call) for call in turn.meta.get("calls") or ()],
        }
        said = {"who": turn.role, "text": clipped(turn.text), "n": turn.stop - turn.start}
        shown.append(said | {name: value for name, value in optional.items() if value not in (None, [])})
    return shown


def call_shown(call: Any) -> list[Any]:
    """Return a call of a tool as [the call in one line, whether it went well]."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in call["arguments"].items())
    return [clipped(f"{call['name'] or '?'}({arguments})"), bool(call["ok"])]


def why_zero(rollout: Any, group: Any) -> str | None:
    """Return why an answer teaches nothing; None when it does."""
    if rollout.reward is None:
        return "It was not scored, so it is left out."
    if rollout.advantage is None:
        return "The update never came to it."
    if np.any(np.asarray(rollout.advantage, dtype=float)):
        if rollout.truncated:
            return "It was cut at max_new_tokens: unless mask_truncated=False, the loss leaves it out."
        return None
    if not group.has_signal:
        return "All answers to this prompt scored the same: nothing to prefer."
    if rollout.truncated:
        return "It was cut at max_new_tokens, and the loss leaves it out."
    return "Its reward equals what it is compared with."


def clipped(text: str) -> str:
    """Return a text, or its beginning and how much is missing."""
    return (
        text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]} […{len(text) - MOST_TEXT} more characters]"
    )


def _number(value: Any) -> float | None:
    return float(f"{value:.5g}") if value is not None and np.isfinite(value) else None


def plain_text(text: str) -> str:
    """Return a text with visible codes for what would be invisible or turn other text around."""
    return UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def frozen(step: int, path: Path, prompts: int) -> dict[str, Any]:
    """Return some rollouts of a step as an output that stays in the file: for whoever asked for texts in it."""
    shown = message(step, path, None, ASKED)
    rows = [
        (group["prompt"] if number == 0 else "", rollout)
        for group in shown["groups"][:prompts]
        for number, rollout in enumerate(group["r"])
    ]
    cells = "".join(
        f'<tr><th scope="row">{_escaped(prompt)}</th><td>{_conversation(rollout)}</td>'
        f"<td>{_shown(rollout['reward'])}</td><td>{_shown(rollout['adv'])}</td></tr>"
        for prompt, rollout in rows
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("prompt", "answer", "reward", "advantage"))
    caption = f"Samples of step {step}"
    return {
        "text/html": f"<table><caption>{caption}</caption><tbody><tr>{head}</tr>{cells}</tbody></table>",
        "text/plain": f"{caption}: {len(rows)} answers",
    }


def _conversation(rollout: dict[str, Any]) -> str:
    """Return an answer; of a conversation, what each said."""
    if "turns" not in rollout:
        return _escaped(rollout["text"])
    return "<br>".join(
        f"<b>{_escaped(turn['name'] if 'name' in turn else turn['who'])}</b> {_escaped(turn['text'])}"
        for turn in rollout["turns"]
    )


def _escaped(text: str) -> str:
    return html.escape(plain_text(text))


def _shown(value: float | None) -> str:
    return "—" if value is None else f"{value:.4g}"
