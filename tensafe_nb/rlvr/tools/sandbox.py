"""The tool that runs a model's Python, in a process of its own with the limits of the reward "python_code"."""

from tensafe_nb.rlvr.rewards.builtin.answers import fenced
from tensafe_nb.rlvr.rewards.builtin.code import said_by_child
from tensafe_nb.rlvr.tools.tool import MOST_CHARACTERS

SECONDS, MEMORY = 3.0, 512 << 20


def python(code: str) -> str:
    """Run Python code and return what it prints, and the value of its last line. Nothing is kept between two calls.

    Args:
        code: The code; its standard library is there, the network and your files are not to be relied on.
    """
    block = fenced(code, "python", "py", "python3", "py3", "")
    job = {
        "code": code if block is None else block,
        "seconds": SECONDS,
        "memory": MEMORY,
        "show": MOST_CHARACTERS,
    }
    said = said_by_child(job, SECONDS, "python")
    if said is None:
        raise TimeoutError(
            f"the code took longer than {SECONDS:g} s, needed more than {MEMORY >> 20} MB, or ended its process"
        )
    return said.rstrip("\n") or "(it printed nothing)"
