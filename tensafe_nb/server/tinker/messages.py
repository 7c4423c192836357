"""The protobuf messages of the protocol, made from `wire.proto` in a descriptor pool of their own.

Nothing is generated, and nothing is registered with protobuf's own pool: the SDK may be loaded in the same process. The
reader below knows the part of the language that `wire.proto` uses.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.batch import Array

Field = descriptor_pb2.FieldDescriptorProto
SCALARS = {
    "bytes": Field.TYPE_BYTES,
    "string": Field.TYPE_STRING,
    "bool": Field.TYPE_BOOL,
    "double": Field.TYPE_DOUBLE,
    "int32": Field.TYPE_INT32,
    "int64": Field.TYPE_INT64,
    "uint32": Field.TYPE_UINT32,
}
FIELD = re.compile(r"(?:(repeated|optional) )?([\w.]+|map<\w+, \w+>) (\w+) = (\d+)")
DTYPES = {1: "<f4", 2: "<i8", 3: "<i4"}  # numpy's names of DType; 4 is bfloat16, the upper half of a float32


def described(text: str) -> descriptor_pb2.FileDescriptorProto:
    """Return the descriptor of a .proto file."""
    file = descriptor_pb2.FileDescriptorProto(name="wire.proto", package=package_of(text), syntax="proto3")
    enums = set(re.findall(r"enum (\w+)", text))
    inside: list[Any] = []  # the enum or message, and the oneof in it
    for line in re.sub(r"//.*", "", text).splitlines():
        match line.split():
            case ["enum", name, "{"]:
                inside.append(file.enum_type.add(name=name))
            case ["message", name, "{"]:
                inside.append(file.message_type.add(name=name))
            case ["oneof", name, "{"]:
                inside.append(inside[0].oneof_decl.add(name=name))
            case ["}"]:
                inside.pop()
            case [name, "=", number] if inside and isinstance(inside[0], descriptor_pb2.EnumDescriptorProto):
                inside[0].value.add(name=name, number=int(number.rstrip(";")))
            case _ if inside and (found := FIELD.match(line.strip())):
                add_field(inside[0], enums, file.package, *found.groups(), in_oneof=len(inside) > 1)
    return file


def package_of(text: str) -> str:
    """Return the package that a .proto file declares."""
    return str(re.findall(r"package ([\w.]+);", text)[0])


def add_field(
    message: Any,
    enums: set[str],
    package: str,
    rule: str | None,
    kind: str,
    name: str,
    number: str,
    *,
    in_oneof: bool,
) -> None:
    """Add a field to a message's descriptor."""
    field = message.field.add(name=name, number=int(number), label=Field.LABEL_OPTIONAL)
    if kind.startswith("map<"):
        key, value = kind[4:-1].split(", ")
        entry = message.nested_type.add(name="".join(part.capitalize() for part in name.split("_")) + "Entry")
        entry.options.map_entry = True
        add_field(entry, enums, package, None, key, "key", "1", in_oneof=False)
        add_field(entry, enums, package, None, value, "value", "2", in_oneof=False)
        rule, kind = "repeated", f"{message.name}.{entry.name}"
    if rule == "repeated":
        field.label = Field.LABEL_REPEATED
    if in_oneof:
        field.oneof_index = len(message.oneof_decl) - 1
    elif rule == "optional":  # which a oneof of its own stands for
        field.proto3_optional, field.oneof_index = True, len(message.oneof_decl)
        message.oneof_decl.add(name=f"_{name}")
    if kind in SCALARS:
        field.type = SCALARS[kind]
    else:
        field.type = Field.TYPE_ENUM if kind in enums else Field.TYPE_MESSAGE
        field.type_name = f".{package}.{kind}"


def made() -> dict[str, Any]:
    """Return the message classes by name."""
    file = described((Path(__file__).parent / "wire.proto").read_text())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = [message.name for message in file.message_type]
    found = {name: pool.FindMessageTypeByName(f"{file.package}.{name}") for name in names}
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}


MESSAGES = made()


def parsed(kind: str, body: bytes) -> Any:
    """Read a message.

    Raises:
        ValidationError: It is none.
    """
    message: Message = MESSAGES[kind]()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise ValidationError(f"The body is no {kind}: {error}.") from error
    return message


def array_of(tensor: Any, name: str) -> Array:
    """Return the values of a Tensor, float32 or int64, in its shape.

    Raises:
        ValidationError: Its bytes do not fit its type or shape.
    """
    try:
        if tensor.HasField("sparse_csr"):
            return dense(tensor)
        return values_of(tensor.dense, tensor.dtype).reshape(tuple(tensor.shape) or -1)
    except (ValueError, KeyError, IndexError, MemoryError) as error:
        raise ValidationError(
            f"loss_fn_inputs[{as_given(name)}]: its bytes do not fit its type {tensor.dtype} and shape "
            f"{list(tensor.shape)} ({error})."
        ) from error


def values_of(data: bytes, dtype: int) -> Array:
    """Return numbers from their bytes; bfloat16 as float32, int32 as int64."""
    if dtype == 4:
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    found = np.frombuffer(data, DTYPES[dtype])
    return found.astype(np.int64) if dtype == 3 else found


def dense(tensor: Any) -> Array:
    """Return the dense values (N, K) of a compressed sparse row tensor."""
    sparse = tensor.sparse_csr
    rows, columns = tensor.shape
    values = values_of(sparse.values, tensor.dtype)
    starts, where = (np.frombuffer(data, "<i8") for data in (sparse.crow_indices, sparse.col_indices))
    widths = np.diff(starts)
    if len(starts) != rows + 1 or len(where) != len(values) or (widths > columns).any():
        raise ValueError("its rows and columns do not fit")
    whole = np.zeros((rows, columns), values.dtype)
    whole[np.repeat(np.arange(rows), widths), where] = values
    return whole


def tokens_of(chunks: Iterator[Any]) -> list[int]:
    """Return the tokens of a model input.

    Raises:
        ValidationError: It holds an image or sound.
    """
    tokens: list[int] = []
    for chunk in chunks:
        if chunk.WhichOneof("chunk") != "encoded_text":
            raise ValidationError("A model input is text here: this server takes neither images nor sound.")
        tokens += np.frombuffer(chunk.encoded_text.tokens, "<i4").tolist()
    return tokens


def batched(arrays: list[Array]) -> Any:
    """Return the BatchedTensor of float32 arrays (N_i, …) that agree in all but their first axis."""
    ends = np.cumsum([0, *(4 * array.size for array in arrays)], dtype="<i8")
    return MESSAGES["BatchedTensor"](
        data=b"".join(np.ascontiguousarray(array, "<f4").tobytes() for array in arrays),
        offsets=ends.tobytes(),
        dtype=1,
        trailing_shape=arrays[0].shape[1:],
    )
