import pytest

import tensafe_nb as tn
from tensafe_nb.registry import Registry


def test_running_a_cell_again_replaces_its_own_function() -> None:
    registry = Registry("loss")

    def define(value: int):
        def mine() -> int:
            return value

        return mine

    registry.register("mine")(define(1))
    registry.register("mine")(define(2))
    assert registry.resolve("mine")() == 2


def test_a_different_function_under_a_taken_name_needs_overwrite() -> None:
    registry = Registry("loss")
    registry.register("mine")(len)
    with pytest.raises(tn.ValidationError, match=r"'mine' is taken by builtins\.len.*overwrite=True"):
        registry.register("mine")(max)
    registry.register("mine", overwrite=True)(max)
    assert registry.resolve("mine") is max


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine_", "no reward named 'mine_'. Did you mean 'mine'"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("math:sqroot", "'math' has no 'sqroot'. Did you mean 'sqrt'"),
        ("math:pi", "is a float, not a callable"),
        (3, "not 3"),
    ],
)
def test_what_cannot_be_resolved_says_why(spec, message: str) -> None:
    registry = Registry("reward")
    registry.register("mine")(len)
    with pytest.raises(tn.ValidationError, match=message):
        registry.resolve(spec)


def test_a_callable_a_name_and_a_dotted_path_resolve() -> None:
    import math

    registry = Registry("reward")
    registry.register("mine")(len)
    assert registry.resolve(max) is max
    assert registry.resolve("mine") is len
    assert registry.resolve("math:sqrt") is math.sqrt
