"""Where the numbers of a plain Parquet column chunk lie in its file. It knows Parquet's pages, not what is in them.

Arrow decodes nested lists value by value. Where a chunk is one uncompressed page of plainly encoded values, they lie in
the file as they lie in memory, and can be copied from there:

    page header (Thrift), length and repetition levels, length and definition levels, values

Every condition is checked against the file's own metadata; what meets none of it is left to Arrow.
"""

from typing import Any, BinaryIO

# Field headers of Thrift's compact protocol: the next field and the one after the next, an integer or a struct.
_INTEGER, _STRUCT_SKIPPING_ONE = 0x15, 0x2C
_DATA_PAGE, _PLAIN = 0, 0
_LONGEST_HEADER = 64  # bytes that surely hold what is read of a page header


def plain_values(file: BinaryIO, chunk: Any, size: int) -> int | None:
    """Offset of the values of a column chunk whose column is a list.

    Parameters
    ----------
    file
        The Parquet file, open for reading.
    chunk
        ``pyarrow.parquet.ColumnChunkMetaData``.
    size
        Bytes that the values must take, none of them null.

    Returns
    -------
    The offset of ``size`` bytes of values; None if the chunk is no single uncompressed page of so many plain values.
    """
    if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page:
        return None
    end = chunk.data_page_offset + chunk.total_compressed_size
    file.seek(chunk.data_page_offset)
    page = _page(file.read(_LONGEST_HEADER))
    if page is None or page[1] != chunk.num_values:  # another page follows
        return None
    position = end - page[0]
    for _ in ("repetition", "definition"):
        file.seek(position)
        position += 4 + int.from_bytes(file.read(4), "little")
    # Nulls and empty lists have levels, but no values: the sizes add up only if all values are there.
    return position if position + size == end else None


def _page(header: bytes) -> tuple[int, int] | None:
    """(bytes after the header, number of values) of a plain data page of version 1 without checksum, or None."""
    fields, position = [], 0
    for expected in (_INTEGER, _INTEGER, _INTEGER, _STRUCT_SKIPPING_ONE, _INTEGER, _INTEGER):
        if header[position] != expected:
            return None
        position += 1
        if expected == _INTEGER:
            value, position = _varint(header, position)
            fields.append(value)
    kind, _, size, values, encoding = fields
    return (size, values) if (kind, encoding) == (_DATA_PAGE, _PLAIN) else None


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A non-negative integer of Thrift's compact protocol (zigzag, seven bits a byte) and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        value, shift, position = value | (byte & 0x7F) << shift, shift + 7, position + 1
        if byte < 0x80:
            return value >> 1, position
