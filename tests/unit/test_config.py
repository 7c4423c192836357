import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import tensafe_nb as tn
from tensafe_nb.rlvr import PPOConfig


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
        (
            lambda: tn.TrainingConfig(learning_rate=1e-3),
            r"no field 'learning_rate'\. It is a field of optimizer: optimizer=\{'learning_rate': …\}",
        ),
        (lambda: tn.OptimizerConfig(schedule="cosine"), r"schedule='cosine' needs total_steps"),
        (lambda: tn.LoRAConfig(rank=0), r"LoRAConfig\.rank: .*greater than 0 \(got 0\)"),
        (lambda: tn.TrainingConfig(dtype="float8"), r"TrainingConfig\.dtype.*'float8'"),
        (lambda: tn.SamplingConfig(temperature=-1), r"SamplingConfig\.temperature"),
        (lambda: tn.SamplingConfig(stop=("",)), r"a stop string must not be empty"),
        (lambda: tn.SamplingConfig(stop_tokens=5), r"stop_tokens: a list is expected, such as \[5\], not 5"),
        (
            lambda: tn.LoRAConfig(target_modules=5),
            r"LoRAConfig\.target_modules: a list or a text is expected, not 5\.$",
        ),
        (
            lambda: tn.LoRAConfig(target_modules=["q_proj", 5]),
            r"^LoRAConfig\.target_modules\.1: .*string \(got 5\)\.$",
        ),
        (
            lambda: PPOConfig(clip_range="x"),
            r"^PPOConfig\.clip_range: a number or a list is expected, not 'x'\.$",
        ),
        (
            lambda: PPOConfig(clip_range=-1),
            r"^PPOConfig\.clip_range: .*greater than or equal to 0 \(got -1\)\.$",
        ),
        (lambda: PPOConfig(clip_range=[0, -1]), r"^PPOConfig\.clip_range\.1: .*equal to 0 \(got -1\)\.$"),
        (lambda: PPOConfig(clip_range=[1]), r"^PPOConfig\.clip_range: two values are expected, not \[1\]\.$"),
        (
            lambda: tn.OptimizerConfig(betas=[0.9]),
            r"^OptimizerConfig\.betas: two values are expected, not \[0\.9\]\.$",
        ),
        (
            lambda: tn.OptimizerConfig(betas=0.9),
            r"betas: a list is expected, such as \[0\.9, 0\.9\], not 0\.9",
        ),
        (lambda: tn.LoRAConfig(layers_to_transform=3), r"a list is expected, such as \[3\], not 3"),
        (
            lambda: tn.TrainingConfig(lora_config={"exclude_modules": 5}),
            r"^LoRAConfig\.exclude_modules: a list or a text is expected, not 5\.$",
        ),
        (lambda: tn.TrainingConfig(model_ref=" "), r"TrainingConfig\.model_ref: name a model"),
        (lambda: tn.SamplingConfig(n=2), r"no field 'n'\. Did you mean 'num_samples'\?"),
        (lambda: tn.LoRAConfig(r=2), r"no field 'r'\. Did you mean 'rank'\?"),
        (lambda: tn.OptimizerConfig(lr=2), r"no field 'lr'\. Did you mean 'learning_rate'\?"),
        (lambda: tn.SamplingConfig(max_new_tokens=10**30), r"max_new_tokens: no model reads so many tokens"),
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


def test_a_model_is_named_by_a_path_too_and_one_in_memory_is_told_how_to_be_read(tmp_path: Path) -> None:
    assert tn.TrainingConfig(model_ref=tmp_path).model_ref == str(tmp_path)

    class Model:
        def save_pretrained(self, folder: str) -> None: ...

    with pytest.raises(tn.ValidationError, match=r"model\.save_pretrained\(folder\).* and model_ref=folder"):
        tn.TrainingConfig(model_ref=Model())


def test_a_number_of_numpys_or_torchs_is_a_number() -> None:
    for number in (np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
        assert tn.SamplingConfig(temperature=number) == tn.SamplingConfig(temperature=0.5)


def test_one_stop_string_is_a_list_of_one_and_none_are_no_stops() -> None:
    assert tn.SamplingConfig(stop="\n").stop == ("\n",)
    assert tn.SamplingConfig(stop=None, stop_tokens=None) == tn.SamplingConfig()
    assert tn.LoRAConfig(modules_to_save="lm_head", target_parameters=None).modules_to_save == ("lm_head",)
    assert tn.LoRAConfig(exclude_modules=None) == tn.LoRAConfig()


@pytest.mark.parametrize(
    ("method", "config"),
    [
        (tn.ServiceClient.create_training_client, tn.TrainingConfig),
        (tn.TrainingClient.sample, tn.SamplingConfig),
    ],
)
def test_a_method_that_takes_a_configuration_spells_its_fields_defaults_and_words(method, config) -> None:
    parameters = inspect.signature(method).parameters
    spelled = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "stream"
    }
    fields = {
        name: field.get_default(call_default_factory=True) for name, field in config.model_fields.items()
    }
    assert spelled == fields
    told = set(re.findall(r"^    (\w+): ", inspect.getdoc(method) or "", flags=re.MULTILINE))
    assert set(fields) <= told
    assert all(parameters[name].annotation is not parameters[name].empty for name in fields)


@pytest.mark.parametrize(
    ("method", "but"),
    [
        (tn.ServiceClient.restore, set()),
        (tn.TrainingClient.fork, {"model_ref", "lora_config", "resize_embeddings"}),
    ],
)
def test_what_can_be_changed_of_a_state_is_spelled(method, but: set[str]) -> None:
    parameters = inspect.signature(method).parameters
    assert set(parameters) - {"self", "artifact_id"} == set(tn.TrainingConfig.model_fields) - but
    assert repr(parameters["optimizer"].default) == "as it is"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_config": 8}, r"not 8\. Write lora_config=LoRAConfig\(rank=8\)\.$"),
        ({"optimizer": "adamw"}, r"not 'adamw'\. Write optimizer=OptimizerConfig\(name='adamw'\)\.$"),
        (
            {"optimizer": "adamm"},
            r"\.optimizer is an OptimizerConfig, or a dict of its fields, not 'adamm'\. "
            r"Write optimizer=OptimizerConfig\(name='adam'\)\.$",
        ),
        ({"loss": "mse"}, r"Write loss=LossConfig\(type='mse'\)\.$"),
        ({"optimizer": 1e-3}, r"Write optimizer=OptimizerConfig\(learning_rate=0\.001\)\.$"),
        ({"optimizer": [1]}, r"Write optimizer=OptimizerConfig\(learning_rate=0\.0001\)\.$"),
        (
            {"dp_config": 8.0},
            r"\.dp_config is a DPConfig, or a dict of its fields, not 8\.0\. "
            r"Write dp_config=DPConfig\(target_epsilon=8\.0, dataset_size=10000\)\.$",
        ),
        ({"dp_config": True}, r"Write dp_config=DPConfig\(target_epsilon=8\.0, dataset_size=10000\)\.$"),
    ],
)
def test_a_bare_value_for_a_configuration_is_told_how_to_write_it(fields, message: str) -> None:
    with pytest.raises(tn.ValidationError, match=message):
        tn.TrainingConfig(**fields)


def test_a_keyword_comes_on_top_of_a_configuration_though_it_be_the_default(
    service: tn.ServiceClient,
) -> None:
    config = tn.TrainingConfig(batch_size=3, seed=5)
    assert service.create_training_client(config, batch_size=8).config == config.replace(batch_size=8)
    assert service.create_training_client(config=config).config == config


@pytest.mark.parametrize("given", ["builtin:tiny", {"batch_size": 3}, tn.TrainingConfig])
def test_what_is_no_configuration_is_refused_with_the_way_to_give_its_fields(
    service: tn.ServiceClient, given: object
) -> None:
    with pytest.raises(tn.ValidationError, match=r"takes a TrainingConfig, .*such as model_ref=…, not "):
        service.create_training_client(given)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="positional"):
        service.create_training_client(tn.TrainingConfig(), 3)  # type: ignore[misc]
