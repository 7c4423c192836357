"""A run as a YAML file: what is read, what is refused and with which line, and that writing it loses nothing."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tensafe_nb as tn
from tensafe_nb.config import LossConfig, TrainingConfig
from tensafe_nb.recipes.recipe import LAYOUT, AlgoConfig, Recipe, RewardConfig, RLVRConfig, load_config

TRAPS = [
    "null",
    "~",
    "true",
    "no",
    "1e5",
    "010",
    "1_000",
    "0x1f",
    "2026-01-02",
    "<<",
    "=",
    "- a",
    "a: b",
    "\u2028",
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(TRAPS)
RATES = st.floats(1e-12, 1.0)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
NAMED: dict[str, Any] = {
    "type": st.just("my_package.mine:fn"),
    "kwargs": st.dictionaries(TEXTS, PLAIN, max_size=3),
}
OPTIMIZERS = st.builds(
    tn.OptimizerConfig,
    name=st.sampled_from(["adamw", "adam", "sgd", "adafactor"]),
    learning_rate=RATES,
    betas=st.tuples(RATES.filter(lambda beta: beta < 1), RATES.filter(lambda beta: beta < 1)),
    max_grad_norm=st.none() | RATES,
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    total_steps=st.integers(1, 10**6),
)
MODEL = {"model_ref": TEXTS.filter(str.strip), "seed": st.integers(0, 2**63 - 1), "optimizer": OPTIMIZERS}
ADAPTERS = st.builds(tn.LoRAConfig, target_modules=st.just("all-linear") | st.lists(TEXTS, max_size=3))
COUNTS = st.none() | st.integers(1, 10**6)
SFT = st.builds(
    Recipe,
    training=st.builds(
        TrainingConfig,
        lora_config=st.none() | ADAPTERS,
        loss=st.builds(LossConfig, **NAMED),
        batch_size=st.integers(1, 512),
        **MODEL,
    ),
    steps=COUNTS,
    epochs=COUNTS,
    max_length=COUNTS,
)
RLVR = st.builds(
    Recipe,
    mode=st.just("rlvr"),
    training=st.builds(TrainingConfig, **MODEL),
    rlvr=st.builds(
        RLVRConfig,
        reward=st.builds(RewardConfig, **NAMED),
        algo=st.builds(AlgoConfig, kwargs=st.fixed_dictionaries({}, optional={"entropy_coef": RATES})),
        temperature=RATES,
        stop=st.lists(TEXTS, max_size=3),
    ),
    steps=COUNTS,
)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Any:
    """Return a function that writes a file and returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@given(recipe=SFT | RLVR)
@settings(max_examples=40)
def test_what_is_written_is_read_back_equal(recipe: Recipe, recipe_file: Any) -> None:
    assert load_config(recipe_file(recipe.to_yaml())) == recipe


def test_every_section_reaches_its_field(recipe_file: Any) -> None:
    recipe = load_config(
        recipe_file("""
training: {mode: sft, steps: 20, eval_every: 5, seed: 7}
model: {model_ref: builtin:sums, device: cpu}
lora: {rank: 4, target_modules: [q_proj]}
optimizer: {name: sgd, learning_rate: 1e-3}
batch: {batch_size: 4, gradient_accumulation_steps: 2, max_length: 64}
loss: {type: token_ce, kwargs: {label_smoothing: 0.1}}
""")
    )
    assert recipe == Recipe(
        steps=20,
        eval_every=5,
        max_length=64,
        training=TrainingConfig(
            model_ref="builtin:sums",
            device="cpu",
            seed=7,
            lora_config=tn.LoRAConfig(rank=4, target_modules=["q_proj"]),
            optimizer=tn.OptimizerConfig(name="sgd", learning_rate=1e-3),
            batch_size=4,
            gradient_accumulation_steps=2,
            loss=LossConfig(kwargs={"label_smoothing": 0.1}),
        ),
    )


def test_one_word_stands_for_a_model_a_loss_a_reward_and_an_algorithm(recipe_file: Any) -> None:
    sft = load_config(recipe_file("model: builtin:sums\nloss: token_ce"))
    assert (sft.training.model_ref, sft.training.loss.type) == ("builtin:sums", "token_ce")
    rlvr = load_config(
        recipe_file("training: {mode: rlvr}\nrlvr: {reward: exact_match, algo: reinforce}")
    ).rlvr
    assert (rlvr.reward.type, rlvr.algo.type) == ("exact_match", "reinforce")


def test_null_is_the_default_where_python_takes_none_for_it(recipe_file: Any) -> None:
    options = "algo: null, stop: null, eval_pass_at: null"
    with_nulls = load_config(
        recipe_file(
            f"training: {{mode: rlvr}}\nrlvr: {{reward: {{type: exact_match, kwargs: null}}, {options}}}"
        )
    )
    assert with_nulls == load_config(recipe_file("training: {mode: rlvr}\nrlvr: {reward: exact_match}"))
    one_text = load_config(recipe_file('training: {mode: rlvr}\nrlvr: {reward: exact_match, stop: "#"}'))
    assert one_text.rlvr.stop == ("#",)


def test_a_file_names_columns_a_template_held_out_prompts_and_how_they_are_chosen(
    recipe_file: Any, service: tn.ServiceClient
) -> None:
    recipe = load_config(
        recipe_file(
            """
training: {mode: rlvr, steps: 1, eval_every: 1}
model: builtin:sums
lora: {rank: 2}
rlvr:
  reward: exact_match
  answer: solution
  answer_after: "####"
  template: "{question}="
  held_out: 0.3
  prompt_policy: adaptive
  prompts_per_step: 2
  group_size: 2
  max_new_tokens: 4
"""
        )
    )
    rows = [{"question": f"{n}+11", "solution": f"so\n#### {n + 11:03}"} for n in range(10, 26)]
    tc = service.create_training_client(recipe.training)
    assert recipe.start(tc, rows, show=False).result().steps_done == 1
    assert "eval/reward" in tc.history


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "training: {mode: rlvr}\nrlvr:\n  reward: exact_match\n  prompt_policy: adaptve",
            r"line 4: RLVRConfig\.prompt_policy: .*'adaptive'.*'adaptve'",
        ),
        ("traning:\n  mode: sft", r"line 1: There is no section 'traning'\. Did you mean 'training'\?"),
        ("training:\n  mode: sft\n  step: 5", r"line 3: .* no key 'step'\. Did you mean 'steps'\?"),
        ("training:\n  mode: ppo", r"line 2: Recipe\.mode: .*'sft' or 'rlvr'.*'ppo'"),
        ("training:\n  steps: 0", r"line 2: Recipe\.steps: .*greater than 0"),
        ("training: sft", r"line 1: The section training is a mapping of mode, steps.*; this is 'sft'"),
        ("model: {}\noptimizer:\n  lerning_rate: 1", r"line 3: .*no field 'lerning_rate'\. .*'learning_rate'\?"),
        ("optimizer:\n  learning_rate: fast", r"line 2: OptimizerConfig\.learning_rate: .*'fast'"),
        ("optimizer: adamw", r"line 1: .*a dict of its fields, not 'adamw'"),
        ("lora:\n  target_modules:\n  - q_proj\n  - 3", r"line 4: LoRAConfig\.target_modules"),
        ("optimizer:\n  schedule: cosine", r"line 1: .*schedule='cosine' needs total_steps"),
        ("loss:\n  type: token_cee", r"line 2: There is no loss named 'token_cee'\. Did you mean 'token_ce'\?"),
        ("loss:\n  kwargs:\n    smoothing: 1", r"line 3: .*no keyword 'smoothing'\. Did you mean 'label_smoothing'\?"),
        ("training: {mode: rlvr}", r"line 1: Mode rlvr needs a section rlvr"),
        ("model: builtin:sums\nrlvr: {reward: exact_match}", r"line 2: The section rlvr is for mode rlvr"),
        (
            "training: {mode: rlvr}\nrlvr: {reward: exact_match}\nbatch:\n  batch_size: 4",
            r"line 4: batch\.batch_size is not read in mode rlvr",
        ),
        ("training: {mode: rlvr}\nrlvr:\n  environment: sum", r"line 3: There is no environment named .*'sums'\?"),
        ("training: {mode: rlvr}\nrlvr:\n  group_size: 2", r"name a reward, or an environment"),
        ("training: {mode: rlvr}\nrlvr: {reward: exact_match, environment: sums}", r"and not both"),
        ("training: {mode: rlvr}\nrlvr:\n  reward: exact_mach", r"line 3: There is no reward named .*'exact_match'\?"),
        (
            "training: {mode: rlvr}\nrlvr:\n  reward: exact_match\n  algo:\n    kwargs:\n      baseline: rlo",
            r"line 6: REINFORCEConfig\.baseline: .*'rlo'",
        ),
        ("model: builtin:tiny\ndp:\n  target_epsilon: 8", r"needs dataset_size"),
        ("dp:\n  dataset_size: 9\n  noise: 1", r"line 3: .*no field 'noise'.*noise_multiplier"),
        ("training:\n  seed: 1\n  steps: 2\n  seed: 3", r"line 4: .*'seed' stands here twice"),
        ("optimizer:\n  1: 2", r"line 2: .*'1' must be text"),
        ("model: builtin:tiny\nloss: [", r"line 2: this cannot be read as YAML"),
        ("model: &a [*a]", r"line 1: .*\*a stands inside itself"),
        ("", r"line 1: A recipe is a mapping of sections; this is empty"),
        ("loss: {kwargs: {margin: !!int x}}", r"line 1: .*the tag .*:int. is not read here"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(recipe_file: Any, text: str, message: str) -> None:
    with pytest.raises(tn.ValidationError, match=rf"recipe\.yaml.*{message}"):
        load_config(recipe_file(text))


def test_all_that_is_wrong_is_named_at_once(recipe_file: Any) -> None:
    with pytest.raises(tn.ValidationError) as caught:
        load_config(recipe_file("optimizer:\n  name: adamv\n  eps: 0\nbatch:\n  batch_size: 0"))
    assert [line.split(": ")[0].rpartition(", ")[2] for line in str(caught.value).splitlines()] == [
        "line 2",
        "line 3",
        "line 5",
    ]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(tn.ValidationError, match=r"nosuch\.yaml cannot be read \(looked in /"):
        load_config(tmp_path / "nosuch.yaml")


def test_a_word_stays_a_word_and_a_number_a_number(recipe_file: Any) -> None:
    kwargs = load_config(
        recipe_file(
            "loss: {type: 'm:f', kwargs: {a: no, b: on, c: 1e-4, d: 010, e: 2026-01-02, f: 12:30, g: true}}"
        )
    ).training.loss.kwargs
    assert kwargs == {"a": "no", "b": "on", "c": 1e-4, "d": "010", "e": "2026-01-02", "f": "12:30", "g": True}


def test_reading_a_file_runs_nothing_of_what_it_names(recipe_file: Any) -> None:
    assert load_config(recipe_file("loss: nosuch_module:fn")).training.loss.type == "nosuch_module:fn"


def test_what_yaml_cannot_say_is_not_written() -> None:
    recipe = Recipe(training=TrainingConfig(loss=LossConfig(type="mse", kwargs={"predictions": print})))
    with pytest.raises(tn.ValidationError, match="cannot be written as YAML: <built-in function print>"):
        recipe.to_yaml()


def test_every_field_of_a_training_client_has_its_place_in_a_file() -> None:
    placed = {at[1] for at in LAYOUT.values() if at[0] == "training" and len(at) == 2}
    assert placed == set(TrainingConfig.model_fields)


def test_the_defaults_are_those_of_the_trainer() -> None:
    parameters = inspect.signature(tn.rlvr.RLVRTrainer).parameters
    defaults = {name: field.default for name, field in RLVRConfig.model_fields.items()}
    assert {name: defaults[name] for name in defaults if name not in ("reward", "algo")} == {
        name: parameters[name].default for name in defaults if name not in ("reward", "algo")
    }


def test_a_recipe_starts_a_supervised_run(tmp_path: Path, service: tn.ServiceClient) -> None:
    recipe = Recipe(training=TrainingConfig(batch_size=2, loss=LossConfig(kwargs={"label_smoothing": 0.2})))
    tc = service.create_training_client(recipe.training)
    rows = [{"prompt": "abs(x)\n", "completion": "Return the absolute value."}, "def f(): ...", "len(x)"]
    result = recipe.replace(epochs=2, eval_every=2).start(tc, rows, rows[:1], show=False).result()
    assert (result.state, result.steps) == ("FINISHED", 4)
    assert tc.history.series("eval/loss")[0].tolist() == [0, 2, 4]


def test_a_recipe_starts_reinforcement_learning(service: tn.ServiceClient) -> None:
    rlvr = RLVRConfig(reward="exact_match", prompts_per_step=2, group_size=2, max_new_tokens=4)
    recipe = Recipe(mode="rlvr", training=TrainingConfig(model_ref="builtin:sums"), steps=2, rlvr=rlvr)
    tc = service.create_training_client(recipe.training)
    sums = tn.datasets.sums(4, seed=0)
    result = recipe.start(tc, sums, sums, show=False).result()
    assert result.state == "FINISHED"
    assert {"reward", "eval/reward"} <= set(result.metrics)


def test_a_recipe_starts_conversations_with_an_environment(service: tn.ServiceClient) -> None:
    rlvr = RLVRConfig(
        environment={"type": "sums", "max_turns": 2}, algo={"kwargs": {"mask_truncated": False}},
        prompts_per_step=2, group_size=2, max_new_tokens=4,
    )  # fmt: skip
    recipe = Recipe(mode="rlvr", training=TrainingConfig(model_ref="builtin:sums"), steps=1, rlvr=rlvr)
    sums = tn.datasets.sums(4, seed=0)
    tc = service.create_training_client(recipe.training)
    run = recipe.start(tc, [{"sums": sums[:2]}, {"sums": sums[2:]}], show=False)
    run.result()
    assert run.rollouts()[1].longest == 8


def test_what_a_run_lacks_is_said_before_it_starts(service: tn.ServiceClient) -> None:
    tc = service.create_training_client()
    with pytest.raises(tn.ValidationError, match="eval_every is 5, but there are no held-out rows"):
        Recipe(eval_every=5).start(tc, ["abc"])
    with pytest.raises(tn.ValidationError, match="rlvr needs a number of steps"):
        Recipe(mode="rlvr", rlvr=RLVRConfig(reward="exact_match")).start(tc, ["abc"])


@pytest.mark.parametrize(
    ("mode", "model", "dtype"),
    [
        ("rlvr", "device: cpu", "float32"),
        ("rlvr", "device: cpu, dtype: bfloat16", "bfloat16"),  # asked for is asked for
        ("rlvr", "device: cuda", "auto"),
        ("sft", "device: cpu", "auto"),
    ],
)
def test_recipes_that_learn_from_rewards_take_float32_on_a_cpu(recipe_file, mode, model, dtype):
    rlvr = "rlvr: {reward: exact_match}" if mode == "rlvr" else ""
    text = f"training: {{mode: {mode}}}\nmodel: {{model_ref: some/model, {model}}}\n{rlvr}"
    assert load_config(recipe_file(text)).training.dtype == dtype


@pytest.mark.parametrize("is_cpu", [True, False])
def test_where_the_device_is_found_out_so_is_the_precision(monkeypatch, is_cpu):
    monkeypatch.setattr("tensafe_nb.engine.models.load.is_cpu", lambda name: is_cpu)
    recipe = Recipe(mode="rlvr", rlvr=RLVRConfig(reward="exact_match"))
    assert recipe.training.dtype == ("float32" if is_cpu else "auto")
