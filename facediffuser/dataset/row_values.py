"""What the rows of a dataset's Parquet hold: looked at when they are read, so that no reader meets what no run writes."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from facediffuser.dataset.schema import is_list

STATUS = ("ok", "failed")
# Parts of a face that may be unknown: it is nobody's, or there is nobody else.
UNKNOWN_OF_FACE = ("subject_id", "similarity", "other_subject_id", "other_similarity")
# Lists of four numbers that have no type of that length.
BOXES = ("face_boxes", "face_box", "crop_box")
NEVER_EMPTY = ("subject_ids",)


def value_problems(table: pa.Table, known: pa.Schema) -> Iterator[str]:
    """Yield what is wrong with the values of the columns that a schema knows; nothing for rows as runs write them.

    Args:
        table: rows, with some of the columns.
        known: the schema of the object they are read from; its columns' types are those of the table, or alike.
    """
    for name in table.column_names:
        if name not in known.names:
            continue
        column = table[name].combine_chunks()
        if not known.field(name).nullable and column.null_count:
            yield f"column {name!r} holds nulls"
        yield from (f"column {name!r} holds {what}" for what in _inside(column, name))
    if "status" in table.column_names and "status" in known.names:
        status = table["status"]
        odd = [value for value in pc.unique(status).to_pylist() if value not in STATUS]
        if odd:
            yield f"column 'status' holds {str(odd[0])[:20]!r}, not one of {', '.join(STATUS)}"
        if "image" in table.column_names:
            made, there = pc.equal(status, "ok"), pc.is_valid(pc.struct_field(table["image"], "bytes"))
            if pc.any(pc.and_(made, pc.invert(there))).as_py():
                yield "column 'image' is null in a row whose status is ok"


def _inside(values: pa.Array, name: str) -> Iterator[str]:
    """Yield what is wrong inside of lists and structs."""
    kind = values.type
    if isinstance(values, pa.DictionaryArray):
        return
    if is_list(kind):
        elements = values.flatten()
        if elements.null_count:
            yield "lists with nulls in them"
        lengths = pc.list_value_length(values)
        if name in NEVER_EMPTY and pc.any(pc.equal(lengths, 0)).as_py():
            yield "empty lists"
        is_number = pa.types.is_floating(elements.type) or pa.types.is_integer(elements.type)
        if name in BOXES and is_number and pc.any(pc.not_equal(lengths, 4)).as_py():
            yield "boxes that are not four numbers"
        yield from _inside(elements, name)
    elif pa.types.is_struct(kind) and name == "image":
        length = pc.fill_null(pc.binary_length(pc.struct_field(values, "bytes")), 0)
        if pc.any(pc.and_(values.is_valid(), pc.equal(length, 0))).as_py():
            yield "images without bytes"
    elif pa.types.is_struct(kind):
        there = values.filter(values.is_valid())
        for place in range(kind.num_fields):
            part = kind.field(place).name
            inner = pc.struct_field(there, part)
            if inner.null_count and part not in UNKNOWN_OF_FACE:
                yield f"{part!r} without a value"
            yield from _inside(inner, part)
