"""Presets: well-known algorithms, as values of the options."""

from collections.abc import Mapping

from tensafe_nb.checks import checked
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError, nearest
from tensafe_nb.rlvr.algorithms.options import PolicyConfig, PPOConfig, REINFORCEConfig

_PRESETS: dict[str, PolicyConfig] = {
    "reinforce": REINFORCEConfig(baseline="ema"),
    # Ahmadian et al. 2024, arXiv:2402.14740
    "rloo": REINFORCEConfig(baseline="rloo"),
    # Hu 2025, arXiv:2501.03262
    "reinforce_pp": REINFORCEConfig(advantage="reinforce_pp", kl_coef=0.01, aggregation="token_mean"),
    "reinforce_pp_baseline": REINFORCEConfig(
        advantage="reinforce_pp_baseline", kl_coef=1e-3, kl_in="loss", aggregation="token_mean"
    ),
    # Shao et al. 2024, arXiv:2402.03300
    "grpo": PPOConfig(advantage="group", scale="group", clip_range=0.2, aggregation="seq_mean"),
    # Liu et al. 2025, arXiv:2503.20783: neither the std nor the length of an answer divides
    "dr_grpo": PPOConfig(advantage="group", clip_range=0.2),
    # Yu et al. 2025, arXiv:2503.14476: clip higher, token-level loss, dynamic sampling, overlong punishment, no KL.
    # Answers that were cut stay in the loss, or the punishment would not reach them; no dual clip, which is verl's.
    "dapo": PPOConfig(
        advantage="group",
        scale="group",
        clip_range=(0.2, 0.28),
        dual_clip=None,
        aggregation="token_mean",
        mask_truncated=False,
        resample_zero_signal=3,
        overlong=0.2,
    ),
    # MiniMax 2025, arXiv:2506.13585: the ratio is clipped as a weight, so no token loses its gradient
    "cispo": PPOConfig(
        advantage="group", scale="group", loss="cispo", clip_range=(0.0, 5.0), aggregation="token_mean"
    ),
    # Zheng et al. 2025, arXiv:2507.18071: one ratio per sequence
    "gspo": PPOConfig(
        advantage="group", scale="group", ratio="sequence", clip_range=(3e-4, 4e-4), aggregation="seq_mean"
    ),
    # Schulman et al. 2017, arXiv:1707.06347
    "ppo_value": PPOConfig(advantage="gae", clip_range=0.2, ppo_epochs=4, aggregation="token_mean"),
}


@checked
def register_preset(name: str, config: PolicyConfig, *, overwrite: bool = False) -> None:
    """Give options a name: `REINFORCE("name")` or `PPO("name")`, and `rlvr: {algo: name}` in a file.

    Raises:
        ValidationError: The name is taken.
    """
    if name in _PRESETS and not overwrite and _PRESETS[name] != config:
        raise ValidationError(
            f"There is a preset {as_given(name)} already: choose another name, or overwrite=True."
        )
    _PRESETS[name] = config


def options_of(name: str) -> PolicyConfig:
    """Return the options that an algorithm's name stands for: "reinforce", "ppo" or a preset.

    "reinforce" by itself chooses its baseline.

    Raises:
        ValidationError: There is none of this name.
    """
    known = _PRESETS | {"reinforce": REINFORCEConfig(), "ppo": PPOConfig()}
    if name not in known:
        raise ValidationError(f"There is no algorithm {as_given(name)}.{nearest(name, known)}")
    return known[name]


def get_presets() -> Mapping[str, PolicyConfig]:
    """Return the presets by name."""
    return dict(_PRESETS)


@checked
def preset(name: str, kind: type[PolicyConfig]) -> PolicyConfig:
    """Return the options of a preset.

    Raises:
        ValidationError: There is none of this name, or it belongs to the other algorithm.
    """
    if name not in _PRESETS:
        raise ValidationError(f"There is no preset {as_given(name)}.{nearest(name, _PRESETS)}")
    found = _PRESETS[name]
    if not isinstance(found, kind):
        raise ValidationError(
            f"The preset {as_given(name)} is one of {type(found).__name__.removesuffix('Config')}."
        )
    return found
