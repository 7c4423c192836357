import pytest

import tensafe_nb as tn


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tn.OptimizerConfig(name="adamv"),
            r"OptimizerConfig\.name.*'adamw', 'adam', 'sgd' or 'adafactor'.*'adamv'",
        ),
        (
            lambda: tn.OptimizerConfig(lerning_rate=1),
            r"no field 'lerning_rate'\. Did you mean 'learning_rate'\?",
        ),
        (lambda: tn.OptimizerConfig(schedule="cosine"), r"schedule='cosine' needs total_steps"),
        (lambda: tn.LoRAConfig(rank=0), r"LoRAConfig\.rank: .*greater than 0 \(got 0\)"),
        (lambda: tn.TrainingConfig(dtype="float8"), r"TrainingConfig\.dtype.*'float8'"),
        (lambda: tn.SamplingConfig(temperature=-1), r"SamplingConfig\.temperature"),
        (lambda: tn.SamplingConfig(stop=("",)), r"a stop string must not be empty"),
    ],
)
def test_a_wrong_field_names_itself_and_what_fits(make, message: str) -> None:
    with pytest.raises(tn.ValidationError, match=message):
        make()


def test_configurations_are_frozen_and_replaced() -> None:
    config = tn.TrainingConfig(batch_size=4, gradient_accumulation_steps=8)
    with pytest.raises(Exception, match="frozen"):
        config.batch_size = 5
    assert config.replace(batch_size=2).batch_size == 2
    assert config.model_ref == "builtin:tiny"


def test_one_stop_string_is_a_list_of_one() -> None:
    assert tn.SamplingConfig(stop="\n").stop == ("\n",)
