"""Tools: plain Python functions that a model may call, and two that come along."""

from tensafe_nb.rlvr.tools.arithmetic import calculator
from tensafe_nb.rlvr.tools.formats import ToolCall, ToolFormat
from tensafe_nb.rlvr.tools.sandbox import python
from tensafe_nb.rlvr.tools.tool import Tool, ToolError

__all__ = ["Tool", "ToolCall", "ToolError", "ToolFormat", "calculator", "python"]
